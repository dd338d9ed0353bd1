#!/usr/bin/env bash
# The first node of a run by hand: all steps; the ranks of distill wait here for those of the other nodes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../common/env.sh
source "$here/env.sh"
exec bash "$here/run_phase.sh" run "$here/config.yaml"
