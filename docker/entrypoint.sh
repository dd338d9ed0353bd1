#!/usr/bin/env bash
# What tini starts in the image: a program that is installed (bash, ray, torchrun, a file of launch/), else `pocl-dist "$@"`.
#
# It becomes the command (exec): signals and exit codes are the command's own. What a launcher has put into the environment
# goes through as it is: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, SLURM_*, JOB_COMPLETION_INDEX, NCCL_*, ...
# NODE_RANK is added where an Indexed Job of Kubernetes gives only its index.
set -euo pipefail
umask 077

if [ -n "${RANK:-}" ] && [ -z "${WORLD_SIZE:-}" ]; then
    echo "pocl-entrypoint: RANK is $RANK, but WORLD_SIZE is not set: a launcher sets both, or neither" >&2
    exit 2
fi
if [ -n "${JOB_COMPLETION_INDEX:-}" ]; then
    export NODE_RANK=${NODE_RANK:-$JOB_COMPLETION_INDEX}
fi
# Apptainer and OpenShift choose the user: there may be no name and no home for it, and torch asks for both.
if [ -z "${HOME:-}" ] || [ ! -w "$HOME" ]; then
    HOME=$(mktemp -d)
    export HOME
fi
export USER=${USER:-pocl} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

if [ $# -gt 0 ] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
exec pocl-dist "$@"
