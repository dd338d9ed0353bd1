#!/usr/bin/env bash
# Healthy (0): without POCL_DIST_RUN_DIR, when the program starts; with it, when that run is done, at work, stopped and saved,
# or not begun. Unhealthy (1): it failed, or nobody holds it any more though it was to be running.
set -euo pipefail
if [ -z "${POCL_DIST_RUN_DIR:-}" ]; then
    pocl-dist exit-codes >/dev/null || exit 1
    exit 0
fi
code=0
pocl-dist outcome "$POCL_DIST_RUN_DIR" >/dev/null 2>&1 || code=$?
case $code in
    0 | 66 | 75) exit 0 ;;
    *) echo "the run in $POCL_DIST_RUN_DIR ended with exit code $code"; exit 1 ;;
esac
