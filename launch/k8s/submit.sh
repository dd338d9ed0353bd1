#!/usr/bin/env bash
# Submits the steps of a run one after the other; each waits until the one before is done. It runs where kubectl does, and
# may be stopped at any time: the jobs go on, and the same command takes up where they are.
#
# KUBECTL          the program (default: kubectl)
# POLL_SECONDS     between two looks (default: 10)
#
# Ends with 0, 69 (kubectl cannot reach the cluster, or it refuses), or the exit code of the step that failed (1 for a RayJob,
# which tells no more; RUN/status.json does). Steps that are done with this very config are not run again; one that failed is.
# To take everything away: kubectl delete job,rayjob,service,configmap,networkpolicy,pdb -l pocl-run=NAME
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
namespace=@namespace:word@
digest=@digest:word@
entries=(@entries:words@)                      # FILE/KIND/NAME, in order

kube() {
    "${KUBECTL:-kubectl}" --namespace "$namespace" "$@" && return 0
    echo "submit.sh: kubectl $1 failed" >&2
    exit 69
}

look() {  # KIND NAME: DIGEST|STATE, empty when there is none
    kube get "$1" "$2" --ignore-not-found -o \
        'jsonpath={.metadata.annotations.pocl-config}|{.status.jobDeploymentStatus}{range .status.conditions[?(@.status=="True")]}{.type} {end}'
}

state_of() {  # what `look` gave: none, other (not this config's), done, failed, waiting
    case $1 in
        '' | '|') echo none ;;
        "$digest|"*Failed*) echo failed ;;
        "$digest|"*Complete*) echo "done" ;;
        "$digest|"*) echo waiting ;;
        *) echo other ;;
    esac
}

exit_code_of() {  # NAME: of the first container that ended otherwise than well
    local codes code
    codes=$(kube get pods -l "pocl-job=$1" -o 'jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}')
    for code in $codes; do
        if [ "$code" -ne 0 ]; then
            echo "$code"
            return
        fi
    done
    echo 71
}

kube apply -f "$here/run.yaml" || exit 69
for entry in "${entries[@]}"; do
    IFS=/ read -r file kind name <<<"$entry"
    found=$(look "$kind" "$name") || exit 69
    state=$(state_of "$found")
    if [ "$state" = failed ] || [ "$state" = other ]; then
        # Its pods first: two writers of one run directory would only get in each other's way.
        kube delete -f "$here/$file" --ignore-not-found --cascade=foreground --wait || exit 69
        state=none
    fi
    if [ "$state" = none ]; then
        kube apply -f "$here/$file" || exit 69
        state=waiting
    fi
    while [ "$state" = waiting ]; do
        sleep "${POLL_SECONDS:-10}"
        found=$(look "$kind" "$name") || exit 69
        state=$(state_of "$found")
    done
    echo "$name: $state"
    if [ "$state" != "done" ]; then
        echo "submit.sh: $kind $name: $state; its log: kubectl -n $namespace logs -l pocl-job=$name --prefix" >&2
        code=$(exit_code_of "$name") || exit 69
        exit "$code"
    fi
done
