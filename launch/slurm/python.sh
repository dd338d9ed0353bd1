#!/usr/bin/env bash
# The interpreter of the image, as the batch script calls it: python.sh ARGUMENT ...
set -euo pipefail
# shellcheck source=/dev/null
source "$CONTAINER"
exec "${on_this_node[@]}" @python:word@ "$@"
