#!/usr/bin/env bash
# Sends the steps of a run to a Ray cluster as jobs, one after the other; ends with the code of RUN/status.json.
#
# The cluster sees the run directory under the same name as this machine. The token comes from the environment
# (RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN) and stands on no command line. TERM, INT and USR1 make the step that runs save
# and stop (75); the same command goes on from there.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common/env.sh
source "$here/env.sh"
name=@name:word@
address=@address:word@
poll_seconds=@poll_seconds:word@
max_resubmits=@max_resubmits:word@
retryable=@retryable:word@
num_ranks=@num_ranks:word@
num_gpus=@num_gpus:word@
steps=(@steps:words@)
ranks_steps=@ranks_steps:word@

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
address=${address:-${RAY_API_SERVER_ADDRESS:-}}
if [ -z "$address" ]; then
    echo "launch.ray_job.address: null, and RAY_API_SERVER_ADDRESS is not set: where is the Ray cluster?" >&2
    exit 64
fi
jobs() { "$PYTHON" -m ray.scripts.scripts job "$1" --address "$address" "${@:2}"; }

has_asked=
ask_to_stop() {
    has_asked=yes
    mkdir -p "$RUN_DIR/control"
    touch "$RUN_DIR/control/stop"
}
trap ask_to_stop TERM USR1 INT
word() { cksum "$RUN_DIR/status.json" 2>/dev/null; }

# Submits a step and waits for its end; its outcome is in `code`. `ray job` itself knows only 0 and 1.
run_step() {                                 # STEP ranks|other
    local step=$1 id before said state='' num_silent=0 needs=()
    id=$name-$step-$(date +%s)-$RANDOM
    before=$(word)
    if [ "$2" = ranks ]; then
        needs=(--entrypoint-num-cpus "$num_ranks")
        [ "$num_gpus" -eq 0 ] || needs+=(--entrypoint-num-gpus "$num_gpus")
    fi
    if ! said=$(jobs submit --no-wait --submission-id "$id" "${needs[@]}" -- \
        bash "$here/entry.sh" "$PWD" "$step" 2>&1); then
        printf '%s: Ray at %s took no job: %s\n' "$step" "$address" "$(tail -n 1 <<<"$said")" >&2
        exit 69                              # no cluster, or a wrong token: at once, and for a person
    fi
    echo "$step $id"
    while [ -z "$state" ]; do
        sleep "$poll_seconds"
        if said=$(jobs status "$id" 2>&1) || grep -qiE "'$id' (failed|was stopped)" <<<"$said"; then
            num_silent=0
            state=$(grep -oiE "'$id' (succeeded|failed|was stopped)" <<<"$said" | head -n 1)
        elif num_silent=$((num_silent + 1)) && [ "$num_silent" -ge 10 ]; then
            printf '%s: Ray at %s is silent: %s\n' "$step" "$address" "$(tail -n 1 <<<"$said")" >&2
            code=69
            return
        fi
    done
    if [ "$(word)" = "$before" ]; then
        echo "$step: job $id has ended and left no word in $RUN_DIR/status.json: ray job logs $id" >&2
        code=71
        return
    fi
    "$PYTHON" -m pocl_dist outcome "$RUN_DIR" >/dev/null
    code=$?
    if [ "$code" -eq 0 ] && ! grep -qi succeeded <<<"$state"; then
        code=71
    fi
    ! grep -qi stopped <<<"$state" || has_asked=yes
}

for step in "${steps[@]}"; do
    kind=other
    case " $ranks_steps " in *" $step "*) kind=ranks ;; esac
    for ((attempt = 0; attempt <= max_resubmits; attempt++)); do
        run_step "$step" "$kind"
        case " $retryable " in *" $code "*) ;; *) break ;; esac
        [ -z "$has_asked" ] || break
        sleep "$poll_seconds"
        echo "$step: code $code, attempt $((attempt + 1)) of $((max_resubmits + 1))" >&2
    done
    [ -z "$has_asked" ] || rm -f "$RUN_DIR/control/stop"
    if [ "$code" -ne 0 ]; then
        echo "$step: ended with code $code" >&2
        exit "$code"
    fi
done
