# shellcheck shell=bash disable=SC2034
# Sourced: how a command gets into a container. Here: apptainer, of the same shared folders under the same names.

mkdir -p "$RUN_DIR"
mounts=("$PWD" "$(realpath "$RUN_DIR")" @mounts:words@)
in_container=(apptainer exec --pwd "$PWD")
for mount in "${mounts[@]}"; do
    in_container+=(--bind "$mount")
done
if [ "$POCL_DIST_DEVICE" != cpu ]; then
    in_container+=(--nv)
fi
in_container+=(@image:word@)

srun_container=()
on_this_node=("${in_container[@]}")
