#!/usr/bin/env bash
# shellcheck disable=SC2154  # on_this_node comes from container.sh
# The interpreter of the image, as the batch script calls it: python.sh ARGUMENT ...
set -euo pipefail
# shellcheck source=/dev/null
source "$CONTAINER"
exec "${on_this_node[@]}" @python:word@ "$@"
