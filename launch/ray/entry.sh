#!/usr/bin/env bash
# What a job of a Ray cluster runs: entry.sh WORKING_FOLDER STEP
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$1"
# shellcheck source=launch/common/env.sh
source "$here/env.sh"
# A job of the cluster is no rank, and no child of whoever submitted it.
unset RANK WORLD_SIZE LOCAL_RANK POCL_DIST_PARENT POCL_DIST_ATTEMPT POCL_DIST_STARTED
exec bash "$here/run_phase.sh" "$2" "$here/config.yaml"
