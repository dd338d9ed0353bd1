#!/usr/bin/env bash
# Starts the ranks of a step inside a Slurm job: srun starts torchrun once on every node of the job.
#
#   RANKS_PER_NODE=8 launch/srun.sh CONFIG.yaml [MORE.yaml ...] [section.key=value ...]
#
# RANKS_PER_NODE ranks of each node (default: 1)
# NUM_NODES      nodes the run was planned for; another number than the job's is refused (default: the job's)
# STEP           distill, or cache with teacher.cache_engine: zero3 (default: distill)
# PYTHON         interpreter of the environment pocl_dist is installed in (default: python)
# MASTER_ADDR    where rank 0 listens (default: the job's first node)
# MASTER_PORT    lowest of the 500 ports of which the job's id picks rank 0's (default: 8476)
# JOIN_SECONDS   how long nodes wait for one another (default: 900)
# GRACE_SECONDS  how long ranks may take to save once one of them has ended (default: 300)
# LOG_DIR        every rank's output goes there too, one folder per restart and node (default: none)
# CONTAINER      file that says how a command gets into a container (launch/slurm/container_*.sh)
#
# srun's exit code proves nothing (it was 0 after a node had died): how the ranks ended stands in RUN/status.json.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "srun.sh: launch.ranks_with: srun works inside a Slurm job only (pocl-dist launch --target slurm, sbatch, salloc)" >&2
    exit 2
fi
srun_container=()
in_container=()
if [ -n "${CONTAINER:-}" ]; then
    # shellcheck source=/dev/null
    source "$CONTAINER"
fi
nodes=$SLURM_JOB_NUM_NODES
if [ "${NUM_NODES:-$nodes}" -ne "$nodes" ]; then
    echo "srun.sh: launch.nodes: $NUM_NODES, but job $SLURM_JOB_ID has $nodes" >&2
    exit 64
fi
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# torchrun reads its options from these, so that a node can add its own number.
export PET_NNODES=$nodes
export PET_NPROC_PER_NODE=${RANKS_PER_NODE:-1}
export PET_MASTER_ADDR=${MASTER_ADDR:-${names[0]}}
export PET_MASTER_PORT=$((${MASTER_PORT:-8476} + SLURM_JOB_ID % 500))
export PET_RDZV_BACKEND=static PET_RDZV_CONF=timeout=${JOIN_SECONDS:-900}
export PET_MAX_RESTARTS=0                    # the batch script restarts: attempts are counted in one place
export PET_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-300}
# Slurm signals all processes of a step. Passed on by torchrun too, a SIGTERM would arrive twice, which to a rank means
# "now": torchrun is deaf, and the ranks, who put a handler of their own in place, hear it once.
export PET_SIGNALS_TO_HANDLE=SIGQUIT
if [ -n "${LOG_DIR:-}" ]; then
    export PET_TEE=3 PET_LOCAL_RANKS_FILTER=0
fi

# shellcheck disable=SC2016  # expanded on the node
on_node='
    trap "" TERM USR1 INT HUP
    export PET_NODE_RANK=$SLURM_NODEID
    if [ -n "${LOG_DIR:-}" ]; then
        export PET_LOG_DIR="$LOG_DIR/restart-${SLURM_RESTART_COUNT:-0}/node-$SLURM_NODEID"
        mkdir -p "$PET_LOG_DIR"
    fi
    # The time limit counts from the start on a clock that runs since boot: another node has another one.
    [ "$SLURM_NODEID" = 0 ] || unset POCL_DIST_STARTED
    exec "$@"'

exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL --input=none \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_container[@]}" \
    bash -c "$on_node" bash "${in_container[@]}" "${PYTHON:-python}" -m torch.distributed.run \
    --module pocl_dist "${STEP:-distill}" "$@"
