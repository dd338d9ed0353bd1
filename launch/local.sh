#!/usr/bin/env bash
# Starts the distill step (or another one of ranks) on this machine with the deepspeed launcher, one process per rank.
#
#   NUM_RANKS=2 launch/local.sh CONFIG.yaml [MORE.yaml ...] [section.key=value ...]
#
# NUM_RANKS     ranks (default: one per GPU, or 1)
# MASTER_PORT   rendezvous port on 127.0.0.1 (default: a free one)
# STEP          distill, or cache with teacher.cache_engine: zero3 (default: distill)
# PYTHON        interpreter of the environment pocl_dist is installed in (default: python)
#
# The exit code is that of the first rank that failed; RUN/status.json has it too.
set -euo pipefail

PYTHON=${PYTHON:-python}
if [ -z "${NUM_RANKS:-}" ]; then
    NUM_RANKS=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [ -z "${MASTER_PORT:-}" ]; then
    MASTER_PORT=$("$PYTHON" -m pocl_dist.free_port)
fi
if ! command -v nvidia-smi >/dev/null 2>&1 || [ "${CUDA_VISIBLE_DEVICES-all}" = "" ]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
# The launcher replaces CUDA_VISIBLE_DEVICES by 0..N-1; the ranks put the caller's choice back.
if [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then
    export POCL_DIST_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"
fi
# The launcher would otherwise read /job/hostfile; an empty path keeps this on one node.

exec "$PYTHON" -m deepspeed.launcher.runner \
    --hostfile /dev/null --log_level critical --num_gpus "$NUM_RANKS" --master_addr 127.0.0.1 --master_port "$MASTER_PORT" \
    --no_local_rank --module pocl_dist "${STEP:-distill}" "$@"
