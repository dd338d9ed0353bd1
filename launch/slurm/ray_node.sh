#!/usr/bin/env bash
# Runs Ray's daemons of one node until they end: ray_node.sh head OTHER_NODE, or ray_node.sh worker HEAD:PORT
#
# The ports are fixed by the job's id and lie below the range of outgoing connections, which begins at 9000 on some
# systems; two jobs that share a node may share them, so give a job its nodes (launch.slurm.exclusive).
set -uo pipefail
role=$1
in_container=()
# shellcheck source=/dev/null
source "$CONTAINER"
python=("${in_container[@]}" "$IMAGE_PYTHON")

# The address of the interface that leads to the other one: a host's own name may mean 127.0.1.1.
own_address='import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])'
address=$("${python[@]}" -c "$own_address" "${2%:*}") || exit 69
options=(
    --block --disable-usage-stats --log-style=record --node-ip-address="$address"
    --num-cpus="$NODE_CPUS" --num-gpus="$NODE_GPUS" --object-store-memory=209715200
    --temp-dir="/tmp/pocl-ray-$SLURM_JOB_ID"
    --node-manager-port=$((BASE_PORT + 2)) --object-manager-port=$((BASE_PORT + 3))
    --runtime-env-agent-port=$((BASE_PORT + 4)) --dashboard-agent-grpc-port=$((BASE_PORT + 5))
    --dashboard-agent-listen-port=$((BASE_PORT + 6)) --metrics-export-port=$((BASE_PORT + 7))
    --dashboard-port=$((BASE_PORT + 9))      # there is none, but its usual port may lie among the workers'
    --min-worker-port=$((BASE_PORT + 20)) --max-worker-port=$((BASE_PORT + 199))
)
if [ "$role" = head ]; then
    tries=3
    head=$address:$((BASE_PORT + 1))
    options+=(--head --port=$((BASE_PORT + 1)) --ray-client-server-port=$((BASE_PORT + 8)) --include-dashboard=false)
else
    tries=20
    options+=(--address="$2")
fi

daemon=
is_over=
trap 'is_over=yes; [ -z "$daemon" ] || kill -TERM "$daemon" 2>/dev/null' TERM INT
for ((try = 1; try <= tries; try++)); do
    started=$SECONDS
    "${python[@]}" -m ray.scripts.scripts start "${options[@]}" &
    daemon=$!
    while kill -0 "$daemon" 2>/dev/null; do
        if [ "$role" = head ] && [ ! -e "$RAY_DIR/address" ] && (exec 3<>"/dev/tcp/${head%:*}/${head#*:}") 2>/dev/null; then
            echo "$head" >"$RAY_DIR/.address" && mv "$RAY_DIR/.address" "$RAY_DIR/address"
        fi
        if [ -z "$is_over" ] && { [ -e "$RAY_DIR/end" ] || [ ! -d "$RAY_DIR" ]; }; then
            is_over=yes
            kill -TERM "$daemon" 2>/dev/null
        fi
        sleep 1
    done
    wait "$daemon"
    echo "ray_node.sh: $role on $SLURMD_NODENAME ended with $? after $((SECONDS - started)) s, try $try of $tries"
    [ -z "$is_over" ] || exit 0
    # What was up for a while and ended is a lost node: its work goes to the others.
    if [ $((SECONDS - started)) -gt 120 ]; then
        exit 69
    fi
    sleep 5
done
exit 69
