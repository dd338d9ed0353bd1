#!/usr/bin/env bash
# The machine that starts a run over the hosts of a hostfile: all steps; distill runs on the hosts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../common/env.sh
source "$here/env.sh"
exec bash "$here/run_phase.sh" run "$here/config.yaml"
