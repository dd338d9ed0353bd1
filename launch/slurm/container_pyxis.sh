# shellcheck shell=bash disable=SC2034,SC2153
# Sourced: how a command gets into a container. Here: srun's own options, by the plugin Pyxis.

mkdir -p "$RUN_DIR"
run_dir=$(realpath "$RUN_DIR")
# /tmp: Ray's driver and Ray's daemons are in containers of their own, and meet there.
mounts=("$PWD:$PWD" "$run_dir:$run_dir" /tmp:/tmp @mounts:words@)
srun_container=(
    --container-image=@image:word@
    --container-mounts="$(IFS=,; echo "${mounts[*]}")"
    --container-workdir="$PWD"
    --no-container-mount-home
)

in_container=()
on_this_node=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-}" "${srun_container[@]}")
