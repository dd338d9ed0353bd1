# shellcheck shell=bash
# Sourced first by every script of a job, on every node. Filled by pocl_dist/cluster/common_files.py.

umask 077                                  # runs hold rows and weights
ulimit -n 65535 2>/dev/null || ulimit -n "$(ulimit -Hn)"
cd @folder:word@ || exit 74

export PYTHON=@python:word@
export RUN_DIR=@run_dir:word@
export GRACE_SECONDS=@grace_seconds:word@
export POCL_DIST_DEVICE=@device:word@

# A hung collective ends its rank and says where it hung; the watchdog of distill speaks first.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export PYTHONUNBUFFERED=1

if [ "$POCL_DIST_DEVICE" = cpu ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
fi

# launch.environment
#@environment:exports@

# launch.setup
#@setup:lines@
