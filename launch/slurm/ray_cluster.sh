# shellcheck shell=bash disable=SC2154,SC2034  # names of job.sh and container.sh
# Sourced by job.sh: a Ray cluster on the nodes of the job, for one step of actors.
#
# ray_up     starts head and workers; sets ray_address; else sets code (69, 74) and returns 1
# ray_down   ends them, whatever state they are in
#
# Ray's ports listen on all interfaces, and without a token whoever reaches them runs code there: the token is made here,
# for this job, in a file of this user only, and stands on no command line. It is no encryption: see SECURITY.md.

ray_dir=$launch_dir/ray-$SLURM_JOB_ID
ray_address=
ray_watch=
declare -A ray_pids=()                       # node -> its srun
export RAY_DIR=$ray_dir
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$ray_dir/token RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0  # an actor without GPU keeps its environment
export RAY_worker_register_timeout_seconds=120
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # the pass does a lost shard again: nothing is to be drained

ray_fail() {
    echo "$STEP: $1" >&2
    code=$2
    return 1
}

# Every node must see the same folder: the token, the run and its results lie there.
ray_check_shared() {
    local canary=$RANDOM-$SLURM_JOB_ID
    echo "$canary" >"$ray_dir/canary"
    # shellcheck disable=SC2016
    srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --input=none bash -c '
        for _ in 1 2 3 4 5 6 7 8 9 10; do    # a shared file system may show a new file late
            [ "$(cat "$0/canary" 2>/dev/null)" = "$1" ] && touch "$0/sees-$SLURMD_NODENAME" && exit 0
            sleep 1
        done' "$ray_dir" "$canary"
    local node
    for node in "${ray_nodes[@]}"; do
        [ -e "$ray_dir/sees-$node" ] && continue
        ray_fail "node $node does not see $ray_dir: run_dir must lie on a file system that all nodes share" 74
        return 1
    done
}

ray_start_node() {                           # NODE head|worker OTHER
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" --export=ALL --input=none \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_container[@]}" \
        bash "$launch_dir/ray_node.sh" "$2" "$3" >>"$LOG_DIR/ray-$1.log" 2>&1 &
    ray_pids[$1]=$!
}

ray_all_live() {
    local node
    for node in "${ray_nodes[@]}"; do
        [ -n "${ray_pids[$node]:-}" ] || continue
        kill -0 "${ray_pids[$node]}" 2>/dev/null && continue
        ray_fail "Ray has ended on node $node: see $LOG_DIR/ray-$node.log" 69
        return 1
    done
}

ray_up() {
    srun_container=() in_container=() on_this_node=()
    # shellcheck source=/dev/null
    source "$CONTAINER"
    mapfile -t ray_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    rm -rf "$ray_dir"
    mkdir -m 700 "$ray_dir" || { ray_fail "$ray_dir cannot be made" 74; return 1; }
    (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$ray_dir/token")
    ray_check_shared || return 1

    local head=${ray_nodes[0]} ends=$((SECONDS + JOIN_SECONDS)) node waiter
    export IMAGE_PYTHON=$image_python
    ray_start_node "$head" head "${ray_nodes[1]}"
    until [ -s "$ray_dir/address" ]; do      # written when the head listens
        ray_all_live || return 1
        [ "$SECONDS" -lt "$ends" ] || { ray_fail "Ray's head did not start within $JOIN_SECONDS s" 69; return 1; }
        [ -z "$warned" ] || { code=75; return 1; }
        sleep 1
    done
    ray_address=$(cat "$ray_dir/address")
    for node in "${ray_nodes[@]:1}"; do
        ray_start_node "$node" worker "$ray_address"
    done
    "$PYTHON" "$launch_dir/ray_wait.py" "$ray_address" "$nodes" "$JOIN_SECONDS" &
    waiter=$!
    while kill -0 "$waiter" 2>/dev/null; do
        ray_all_live || { kill "$waiter"; return 1; }
        [ -z "$warned" ] || { kill "$waiter"; code=75; return 1; }
        sleep 1
    done
    wait_for "$waiter"
    [ "$code" -eq 0 ] || { ray_fail "Ray's $nodes nodes did not meet within $JOIN_SECONDS s" 69; return 1; }
    echo "$STEP: Ray on $nodes nodes, head $ray_address"
    ray_watch_nodes &
    ray_watch=$!
}

# The driver is a child of run_phase.sh, a child of this shell, of which the watcher is a copy.
ray_end_driver() {
    local phase
    for phase in $(pgrep -P "$$" -f run_phase.sh); do
        pkill -KILL -P "$phase"
    done
}

# A lost worker is told, and the pass goes on without it. Without its head there is nothing to go on with: the driver is
# asked to stop, and ended when it hangs.
ray_watch_nodes() {
    local node
    while [ "${#ray_pids[@]}" -gt 0 ]; do
        for node in "${!ray_pids[@]}"; do
            kill -0 "${ray_pids[$node]}" 2>/dev/null && continue
            unset "ray_pids[$node]"
            [ -e "$ray_dir/end" ] && return
            echo "$STEP: Ray has ended on node $node" >&2
            if [ "$node" = "${ray_nodes[0]}" ]; then
                pkill -USR1 -P "$$" -f run_phase.sh
                sleep 60
                [ -e "$ray_dir/end" ] || ray_end_driver
                return
            fi
        done
        sleep 2
    done
}

# The nodes see the file `end` and end by themselves; whatever does not is ended.
ray_down() {
    local node ends=$((SECONDS + 20))
    touch "$ray_dir/end"
    [ -z "$ray_watch" ] || kill "$ray_watch" 2>/dev/null
    for node in "${!ray_pids[@]}"; do
        while kill -0 "${ray_pids[$node]}" 2>/dev/null && [ "$SECONDS" -lt "$ends" ]; do
            sleep 1
        done
        # The first makes srun send SIGTERM to the node, the second SIGKILL.
        kill -TERM "${ray_pids[$node]}" 2>/dev/null && sleep 2 && kill -TERM "${ray_pids[$node]}" 2>/dev/null
        wait "${ray_pids[$node]}" 2>/dev/null
    done
    ray_pids=()
    rm -rf "$ray_dir"
}
