#!/usr/bin/env bash
# A step that is one process: in a pod of its own (plan, report), or on the head of a Ray cluster (measure, evaluate, ...).
#
#   step.sh STEP
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../common/env.sh
source "$here/env.sh"

exec bash "$here/run_phase.sh" "$1" "$here/config.yaml"
