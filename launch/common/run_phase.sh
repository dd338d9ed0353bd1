#!/usr/bin/env bash
# Runs one step of a run and ends with the code that the run ended with.
#
#   run_phase.sh STEP CONFIG.yaml [COMMAND ...]
#
# RUN_DIR, PYTHON   from env.sh
# COMMAND           what runs the step (default: pocl-dist STEP CONFIG); e.g. torchrun ... distill CONFIG
#
# TERM, USR1, HUP and INT become RUN/control/stop: the step saves and ends with 75. Launchers lose codes
# (torchrun gives 1; srun gave 0 after a lost node), so what counts is RUN/status.json.
set -uo pipefail
# shellcheck source=wait_for.sh
source "$(dirname "${BASH_SOURCE[0]}")/wait_for.sh"

step=$1
config=$2
shift 2
if [ $# -eq 0 ]; then
    set -- "$PYTHON" -m pocl_dist "$step" "$config"
fi
stop_file=$RUN_DIR/control/stop
has_asked=
word() { cksum "$RUN_DIR/status.json" 2>/dev/null; }
before=$(word)

# shellcheck disable=SC2317,SC2329  # called by the trap
ask_to_stop() {
    has_asked=yes
    mkdir -p "$(dirname "$stop_file")"
    touch "$stop_file"
}
trap ask_to_stop TERM USR1 HUP INT

"$@" &
wait_for $!
if [ -n "$has_asked" ]; then
    rm -f "$stop_file"                        # honoured, or too late: the next attempt is not to see it
fi

is_own_code() {
    case $1 in 2 | 64 | 65 | 66 | 69 | 7[0-9]) return 0 ;; *) return 1 ;; esac
}
if ! is_own_code "$code"; then
    if [ "$(word)" != "$before" ]; then
        "$PYTHON" -m pocl_dist outcome "$RUN_DIR" >/dev/null
        said=$?
        if [ "$code" -eq 0 ] || [ "$said" -ne 0 ]; then
            code=$said
        else
            code=71                           # done, says the run, but what ran it died
        fi
    else
        echo "run_phase.sh: $step ended with code $code and left no word in $RUN_DIR/status.json" >&2
        code=71
    fi
fi
exit "$code"
