#!/usr/bin/env bash
# Submits one job for each step, to begin when the one before has ended well. Prints "STEP JOB_ID" of each.
#
# All are asked for on trial first; when Slurm refuses one nothing stays in the queue.
set -uo pipefail
cd @working_folder:word@ || exit 74
folder=@folder:word@
steps=(@steps:words@)

mkdir -p "$folder/logs" || exit 74
for step in "${steps[@]}"; do
    if ! said=$(sbatch --test-only "$folder/$step.sbatch" 2>&1); then
        printf '%s: Slurm refuses this job: %s\n' "$step" "$said" >&2
        exit 69
    fi
done
submitted=()
for step in "${steps[@]}"; do
    after=()
    if [ "${#submitted[@]}" -gt 0 ]; then
        after=(--dependency="afterok:${submitted[-1]}")
    fi
    if ! said=$(sbatch --parsable "${after[@]}" "$folder/$step.sbatch"); then
        [ "${#submitted[@]}" -eq 0 ] || scancel "${submitted[@]}"
        echo "$step: Slurm refused this job; the others were cancelled" >&2
        exit 69
    fi
    submitted+=("${said%%;*}")
    echo "$step ${said%%;*}"
done
