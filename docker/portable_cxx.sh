#!/usr/bin/env bash
# g++ as DeepSpeed's op builder calls it, but for the CPU that CPU_ARCH names (default: AVX2) instead of the one it runs on:
# an image is used on other machines than the one that builds it. No debug information, which would name temporary folders.
set -euo pipefail
arguments=()
for argument in "$@"; do
    case $argument in
        -march=native) argument="-march=${CPU_ARCH:-x86-64-v3}" ;;
        -D__AVX512__) argument=-D__AVX256__ ;;
        -g) argument=-g0 ;;
    esac
    arguments+=("$argument")
done
exec g++ "${arguments[@]}"
