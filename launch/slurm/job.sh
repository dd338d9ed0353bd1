# shellcheck shell=bash disable=SC2154,SC2329  # the script that sources this sets some names; traps call
# What the script of a job does, whatever its step: sourced by it on the first node.
#
# A warning (USR1 by --signal=B:USR1, TERM) makes the step save and end with 75. What a new attempt can mend is put back
# into the queue by this script itself, so that the jobs that wait for it keep waiting: a job that merely ends with a
# code has failed, and Slurm would cancel them. All other codes end the chain.

nodes=$SLURM_JOB_NUM_NODES
max_requeues=@max_requeues:word@
retryable=@retryable:word@
has_container=@has_container:word@
idle_attempts=3                              # so many in a row that finish nothing are no bad luck any more
busy_tries=5                                 # a killed attempt's lock ends by itself, half a minute later

launch_dir=$(realpath @folder:word@) || exit 74
config=$launch_dir/config.yaml
export CONTAINER=$launch_dir/container.sh
export LOG_DIR=$launch_dir/logs/$STEP-$SLURM_JOB_ID
export RANKS_PER_NODE=@ranks_per_node:word@ MASTER_PORT=@master_port:word@
export NODE_CPUS=${SLURM_CPUS_ON_NODE:-1} NODE_GPUS=@gpus_per_node:word@
export JOIN_SECONDS=@join_seconds:word@
export BASE_PORT=$((5000 + SLURM_JOB_ID % 17 * 200))
# Whoever submitted this may have been a rank, or a run, itself.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR POCL_DIST_PARENT POCL_DIST_ATTEMPT POCL_DIST_STARTED
master_address=@master_address:word@
[ -z "$master_address" ] || export MASTER_ADDR=$master_address
mkdir -p "$LOG_DIR"
image_python=$PYTHON
if [ "$has_container" = yes ]; then
    chmod u+x "$launch_dir/python.sh"
    PYTHON=$(realpath "$launch_dir/python.sh")
fi

phase=
code=0
on_warning() {
    warned=yes
    [ -z "$phase" ] || kill -USR1 "$phase" 2>/dev/null
}
trap on_warning USR1 TERM

# shellcheck source=/dev/null
source "$launch_dir/wait_for.sh"

# Runs the step; arguments: a command instead of `pocl-dist STEP CONFIG`.
run_phase() {
    if [ -n "$warned" ]; then
        code=75
        return
    fi
    bash "$launch_dir/run_phase.sh" "$STEP" "$config" "$@" &
    phase=$!
    wait_for "$phase"
    phase=
    [ "$code" -le 128 ] || code=71           # run_phase.sh itself was killed
}

run_step() {
    case $kind in
    ranks)
        if [ "$has_container" = yes ]; then  # srun is outside: rank 0 holds the lock and says how it ended
            run_phase env PYTHON="$image_python" bash "$launch_dir/srun.sh" "$config"
        else
            run_phase
        fi
        ;;
    actors)
        if [ "$nodes" -gt 1 ]; then
            # shellcheck source=/dev/null
            source "$launch_dir/ray_cluster.sh"
            if ray_up; then
                run_phase "$PYTHON" -m pocl_dist "$STEP" "$config" ray.address="$ray_address"
            fi
            ray_down
        else
            run_phase
        fi
        ;;
    *) run_phase ;;
    esac
}

# What is finished in the run directory, as one number.
progress() {
    (cd "$RUN_DIR" 2>/dev/null && find difficulty generated teacher_cache checkpoints export eval \
        -type f ! -path '*/.tmp*' 2>/dev/null | sort | cksum)
}

# Puts this job back into the queue and waits to be ended; returns when that is not to be.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} record=$LOG_DIR/idle num_idle=0 state
    if [ "$(progress)" = "$at_start" ]; then
        [ ! -f "$record" ] || read -r num_idle <"$record"
        num_idle=$((num_idle + 1))
    fi
    echo "$num_idle" >"$record"
    if [ "$num_idle" -ge "$idle_attempts" ]; then
        echo "$STEP: code $code, and $num_idle attempts in a row have finished nothing: the chain ends here" >&2
        return
    fi
    if [ "$restarts" -ge "$max_requeues" ]; then
        echo "$STEP: code $code after $restarts restarts (launch.slurm.max_requeues): the chain ends here" >&2
        return
    fi
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    if [ -n "$state" ] && [ "$state" != RUNNING ]; then
        echo "$STEP: code $code, and the job is $state: whoever ended it decides" >&2
        return
    fi
    echo "$STEP: code $code, restart $((restarts + 1)) of at most $max_requeues" >&2
    if scontrol requeue "$SLURM_JOB_ID"; then
        local ends=$((SECONDS + 300))
        while [ "$SECONDS" -lt "$ends" ]; do # ending by itself now would count as failed
            sleep 5
        done
    fi
    echo "$STEP: the job was not put back into the queue" >&2
}

at_start=$(progress)
echo "── $STEP: job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes node(s): $SLURM_JOB_NODELIST"
run_step
while [ "$code" -eq 73 ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$busy_tries" -gt 0 ]; do
    busy_tries=$((busy_tries - 1))
    sleep 10
    run_step
done
case " $retryable " in
*" $code "*) requeue ;;
esac
exit "$code"
