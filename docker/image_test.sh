#!/usr/bin/env bash
# Builds the CPU image twice from a base made here, compares the digests, and distils the bundled pair inside of it (as root).
#
#   docker/image_test.sh [section.key=value ...]       more overrides for the run, e.g. curriculum.visits_per_example=7
#
# PYTHON   Python 3.11 with pip and setuptools (default: python3); its pip settings say where packages come from
# FOLDER   what is kept between two tests: wheels and base, 1 GB (default: build/image)
#
# buildah, debootstrap and crun are installed when they are missing. Nothing needs a container engine, nor the network after the
# packages are there; the run is in a network namespace that has loopback only. Afterwards image and containers are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=$(realpath -m "${FOLDER:-build/image}")
WORK=$FOLDER/work
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)}

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
version=$("$PYTHON" -c 'import re; print(re.search(r"__version__ = \"(.+)\"", open("pocl_dist/__init__.py").read())[1])')

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

buildah_here() { buildah --root "$WORK/store" --runroot "$WORK/run" --storage-driver overlay "$@"; }

clean_up() {
    # `buildah rm` unmounts; what it cannot is left to be looked at.
    buildah_here rm --all >/dev/null 2>&1 || true
    buildah_here rmi --all --force >/dev/null 2>&1 || true
    umount "$WORK/store/overlay" 2>/dev/null || true
    rm -rf --one-file-system "$WORK"
}

make_base() {
    [ -s "$FOLDER/base.tar" ] && return
    debootstrap --variant=minbase bookworm "$WORK/rootfs" >"$WORK/debootstrap.log" || { tail -n 5 "$WORK/debootstrap.log"; exit 1; }
    rm -rf "$WORK"/rootfs/var/cache/apt/* "$WORK"/rootfs/var/lib/apt/lists/* "$WORK"/rootfs/var/log/*.log
    tar -C "$WORK/rootfs" -cf "$FOLDER/base.tar.part" . && mv "$FOLDER/base.tar.part" "$FOLDER/base.tar"
    rm -rf --one-file-system "$WORK/rootfs"
}

build() {  # TAG: prints the digest
    buildah_here bud --signature-policy "$WORK/policy.json" --isolation chroot --format docker --pull-never --no-cache \
        --timestamp "$SOURCE_DATE_EPOCH" --build-arg BASE=localhost/base:bookworm --build-arg PIP_NO_INDEX=1 \
        --build-arg PIP_FIND_LINKS=/wheels -v "$FOLDER/wheels:/wheels:ro" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
        -f docker/Dockerfile.cpu -t "localhost/pocl-dist:$1" . >"$FOLDER/build-$1.log" 2>&1 || { tail -n 30 "$FOLDER/build-$1.log" >&2; exit 1; }
    buildah_here inspect --type image --format '{{.FromImageDigest}}' "localhost/pocl-dist:$1"
}

differences() {  # of the two builds: names of files, to look at
    local one two
    one=$(buildah_here from --pull-never --signature-policy "$WORK/policy.json" localhost/pocl-dist:first)
    two=$(buildah_here from --pull-never --signature-policy "$WORK/policy.json" localhost/pocl-dist:second)
    diff -rq --no-dereference "$(buildah_here mount "$one")" "$(buildah_here mount "$two")" 2>&1 | head -n 40 || true
    diff <(buildah_here inspect --type image localhost/pocl-dist:first) \
        <(buildah_here inspect --type image localhost/pocl-dist:second) | head -n 40 || true
}

in_image() {  # COMMAND ...: through entry point, as the image's user
    "$PYTHON" tests/loopback.py buildah --root "$WORK/store" --runroot "$WORK/run" --storage-driver overlay \
        run --isolation chroot "$container" -- /usr/bin/tini -- /usr/local/bin/pocl-entrypoint "$@"
}

expect() {  # WHAT FOUND EXPECTED
    [ "$2" = "$3" ] || { echo "image_test: $1 is '$2', expected '$3'" >&2; exit 1; }
    echo "$1: $2"
}

[ "$(id -u)" = 0 ] || { echo "image_test: needs root (debootstrap, buildah)" >&2; exit 1; }
if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null || ! command -v crun >/dev/null; then
    apt-get update -q >/dev/null && apt-get install -q -y --no-install-recommends buildah debootstrap crun >/dev/null
fi
mkdir -p "$FOLDER/wheels"
clean_up
mkdir -p "$WORK"
trap clean_up EXIT
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >"$WORK/policy.json"

say "wheels of docker/requirements.cpu.txt"
"$PYTHON" -m pip download -qq --disable-pip-version-check --no-build-isolation --no-deps --require-hashes \
    -r docker/requirements.cpu.txt -d "$FOLDER/wheels"
say "a Debian base by debootstrap"
make_base
container=$(buildah_here from scratch)
buildah_here add -q "$container" "$FOLDER/base.tar" / >/dev/null
buildah_here commit -q --timestamp "$SOURCE_DATE_EPOCH" --signature-policy "$WORK/policy.json" "$container" localhost/base:bookworm >/dev/null
buildah_here rm "$container" >/dev/null

say "build, the first"
first=$(build first)
say "build, the second, without cache"
second=$(build second)
[ "$second" = "$first" ] || differences
expect "digest of the second build" "$second" "$first"
bytes=$(buildah_here images --json localhost/pocl-dist:first | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[0]["size"])')
echo "size: $bytes"

say "inside"
inspect() { buildah_here inspect --type image --format "{{$1}}" localhost/pocl-dist:first; }
expect "user" "$(inspect .Docker.Config.User)" 10001:10001
expect "entry point" "$(inspect .Docker.Config.Entrypoint)" "[/usr/bin/tini -- /usr/local/bin/pocl-entrypoint]"
expect "health check" "$(inspect .Docker.Config.Healthcheck.Test)" "[CMD /usr/local/bin/pocl-healthcheck]"
container=$(buildah_here from --pull-never --signature-policy "$WORK/policy.json" localhost/pocl-dist:first)
expect "user inside" "$(in_image id -u)" 10001
expect "a write to the program" "$(in_image sh -c 'touch /opt/pocl/x 2>/dev/null && echo possible || echo refused')" refused
expect "caches and logs left" "$(in_image sh -c 'find /root/.cache /var/cache/apt /var/lib/apt/lists /var/log -type f 2>/dev/null | wc -l')" 0
expect "health" "$(in_image pocl-healthcheck && echo good)" good
code=0
in_image plan nothing.yaml 2>/dev/null || code=$?
expect "exit code of a missing config" "$code" 66

say "measure, plan, distill, evaluate, report on the bundled rows"
in_image run configs/tiny_cpu.yaml run_dir=/runs/test curriculum.visits_per_example=2 data.eval_limit=50 "$@"
expect "outcome" "$(in_image sh -c 'pocl-dist outcome /runs/test >/dev/null; echo $?')" 0
in_image pocl-dist verify /runs/test
say "done: $first, $bytes bytes"
