#!/usr/bin/env bash
# Writes the lock files of the images, with the hash of every file that may be installed; no package is downloaded.
#
#   docker/lock.sh cpu [OPTIONS OF UV ...]     docker/requirements.cpu.txt   Python 3.11, torch built for the CPU
#   docker/lock.sh gpu [OPTIONS OF UV ...]     docker/requirements.gpu.txt   Python 3.12, torch with CUDA
#
# Versions are those of constraints.txt; what only the images need beyond it (ray[default]) takes the newest that fits, once:
# a version that a lock has is kept. UV: the program (default: uv). torch's CPU build is on no common index: give
# `--torch-backend cpu` (PyTorch's own index), or `--find-links FOLDER` with its wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?cpu or gpu}
shift
case $kind in
    cpu) python=3.11 ;;
    gpu) python=3.12 ;;
    *) echo "lock.sh: $kind is not allowed: cpu or gpu" >&2; exit 2 ;;
esac
"${UV:-uv}" pip compile --quiet --generate-hashes --no-annotate \
    --custom-compile-command "make lock" \
    --python-version "$python" --python-platform x86_64-manylinux_2_28 \
    --constraints constraints.txt --extra track --extra cluster "$@" \
    setup.py --output-file "docker/requirements.$kind.txt"
