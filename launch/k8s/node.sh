#!/usr/bin/env bash
# One pod of an Indexed Job: the ranks of one node of a step. Every pod starts this, alone; they meet at pod 0.
#
#   node.sh STEP     with JOB_COMPLETION_INDEX and MASTER_ADDR in the environment, as the Job gives them
#
# Ends with the code that the run ended with, which the Job's podFailurePolicy knows. A signal (the pod is to go) becomes
# RUN/control/stop: all pods save and end with 75, and the Job starts them again.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../common/env.sh
source "$here/env.sh"
# shellcheck source=../common/wait_for.sh
source "$here/wait_for.sh"

export STEP=$1
export NUM_NODES=@nodes:word@ RANKS_PER_NODE=@ranks_per_node:word@
export MASTER_PORT=@master_port:word@ JOIN_SECONDS=@join_seconds:word@
: "${JOB_COMPLETION_INDEX:?is given by an Indexed Job}" "${MASTER_ADDR:?is given by the Job}"
export NODE_RANK=$JOB_COMPLETION_INDEX
status=$RUN_DIR/status.json

word() { cksum "$status" 2>/dev/null; }
says() { grep -q "\"$1\": \"$2\"" "$status" 2>/dev/null; }
wait_while() {  # SECONDS COMMAND ...: while the command holds, for so long at most
    local left=$1
    shift
    while [ "$left" -gt 0 ] && "$@"; do
        sleep 2
        left=$((left - 2))
    done
}
# shellcheck disable=SC2329  # both are called by wait_while
is_unknown() { ! getent hosts "$MASTER_ADDR" >/dev/null; }
# shellcheck disable=SC2329
is_locked() { [ -e "$RUN_DIR/lock" ]; }

if [ "$NODE_RANK" -eq 0 ]; then
    # The lock of a pod that was killed ends by itself after its last sign of life. Sooner we would be told "busy" (73).
    wait_while 45 is_locked
else
    wait_while "$JOIN_SECONDS" is_unknown     # the name of pod 0 comes up some time after the pod
fi
before=$(word)
bash "$here/run_phase.sh" "$STEP" "$here/config.yaml" bash "$here/torchrun.sh" "$here/config.yaml" &
pid=$!
trap 'kill -TERM "$pid" 2>/dev/null' TERM INT HUP USR1    # it makes the stop file of them; we wait on
wait_for "$pid"

# Rank 0 has the last word, and it comes after the other pods' ranks have ended. None may count as done before that: the Job
# would not start it again when rank 0 is. What is done stays done, whatever torchrun says of its own end.
if [ "$NODE_RANK" -ne 0 ]; then
    wait_while 120 says state running
fi
if [ "$(word)" != "$before" ] && says phase "$STEP"; then
    if says state 'done'; then
        exit 0
    fi
    if [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; then
        "$PYTHON" -m pocl_dist outcome "$RUN_DIR" >/dev/null
        code=$?
    fi
fi
exit "$code"
