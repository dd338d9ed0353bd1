#!/usr/bin/env bash
# Every node but the first of a run by hand:  bash other_node.sh K     with K = 1 ... nodes - 1
#
# Waits until the first node has come to a step of ranks, joins it, and comes back for the next attempt.
# Ends when the run has: with the code of RUN/status.json.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../common/env.sh
source "$here/env.sh"

export NUM_NODES=@nodes:word@ RANKS_PER_NODE=@ranks_per_node:word@
export MASTER_ADDR=@master_address:word@ MASTER_PORT=@master_port:word@ JOIN_SECONDS=@join_seconds:word@
if [ $# -ne 1 ] || ! [[ $1 =~ ^[0-9]+$ ]] || [ "$1" -lt 1 ] || [ "$1" -ge "$NUM_NODES" ]; then
    echo "other_node.sh: give this node's number, 1 ... $((NUM_NODES - 1)); the first node runs first_node.sh" >&2
    exit 2
fi
export NODE_RANK=$1

says() { grep -q "\"$1\": \"$2\"" "$RUN_DIR/status.json" 2>/dev/null; }
num_quiet=0
has_joined=
echo "other_node.sh: node $NODE_RANK waits for the first node to come to @ranks_steps:words@ in $RUN_DIR"
while :; do
    # shellcheck disable=SC2043  # a list, once it is filled
    for step in @ranks_steps:words@; do
        if says state running && says phase "$step"; then
            has_joined=yes num_quiet=0
            STEP=$step bash "$here/torchrun.sh" "$here/config.yaml" || true    # the first node says how it ended
        fi
    done
    says state running || num_quiet=$((num_quiet + 1))
    # After the ranks were lost the first node may start them again; this is how long that takes at most.
    if { [ -n "$has_joined" ] && [ "$num_quiet" -ge 12 ]; } || { says phase run && says state "done"; }; then
        exec "$PYTHON" -m pocl_dist outcome "$RUN_DIR"
    fi
    sleep 5
done
