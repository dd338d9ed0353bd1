#!/usr/bin/env bash
# Starts the ranks of one node with torchrun; every node runs this, and they meet at the first one.
#
#   NUM_NODES=2 NODE_RANK=0 RANKS_PER_NODE=8 MASTER_ADDR=node1 launch/torchrun.sh CONFIG.yaml [section.key=value ...]
#
# NUM_NODES       machines (default: 1)
# NODE_RANK       this one's number (default: 0, where rank 0 runs and listens)
# RANKS_PER_NODE  ranks of this machine
# MASTER_ADDR     the first node, as the others call it (default: 127.0.0.1 with one node)
# MASTER_PORT     its port (default: 8476)
# JOIN_SECONDS    how long nodes wait for one another (default: 900)
# GRACE_SECONDS   from a signal to the end of the ranks (default: 300)
# STEP            distill, or cache with teacher.cache_engine: zero3 (default: distill)
# PYTHON          interpreter of the environment pocl_dist is installed in (default: python)
#
# torchrun ends with 1 whatever its ranks ended with: RUN/status.json has the code. It starts nothing again:
# attempts are counted in one place, `run.max_restarts` or the scheduler.
set -euo pipefail

PYTHON=${PYTHON:-python}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
GRACE_SECONDS=${GRACE_SECONDS:-300}
if [ "$NUM_NODES" -eq 1 ]; then
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
fi
: "${MASTER_ADDR:?is required with more than one node: the first one, as the others call it}"
: "${RANKS_PER_NODE:?is required}"

options=()
# Newer PyTorch passes more signals on to the ranks, and leaves them the time to save.
run_file=$("$PYTHON" -c 'from importlib.util import find_spec; print(find_spec("torch").submodule_search_locations[0])')/distributed/run.py
if grep -q -e '--signals-to-handle' "$run_file"; then
    options+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
fi
if grep -q -e '--shutdown-timeout' "$run_file"; then
    options+=(--shutdown-timeout "$((GRACE_SECONDS > 20 ? GRACE_SECONDS - 10 : 10))")
fi

# A static rendezvous: node and rank numbers are those given, so rank 0 is where the lock of the run is held.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "$RANKS_PER_NODE" \
    --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-8476}" \
    --rdzv-conf "timeout=${JOIN_SECONDS:-900}" --max-restarts 0 "${options[@]}" \
    --module pocl_dist "${STEP:-distill}" "$@"
