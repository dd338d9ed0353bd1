#!/usr/bin/env bash
# Starts the ranks of a step on the hosts of a hostfile with the deepspeed launcher, over ssh and pdsh.
#
#   HOSTFILE=hosts NUM_NODES=2 RANKS_PER_NODE=8 launch/deepspeed.sh CONFIG.yaml [section.key=value ...]
#
# HOSTFILE           one `HOST slots=N` per line; every host sees this folder, CONFIG, PYTHON and the run directory
# NUM_NODES          the first so many hosts
# RANKS_PER_NODE     ranks of each
# MASTER_ADDR        where rank 0 listens, as the others call it (default: the first host)
# MASTER_PORT        its port (default: 8476)
# SSH_PORT           port of sshd (default: 22)
# SSH_CONFIG         file for `ssh -F` (default: the user's); no blanks in its path
# DEAD_LINK_SECONDS  a host whose link is silent this long is lost (default: 15)
# STEP               distill, or cache with teacher.cache_engine: zero3 (default: distill)
# PYTHON             interpreter, the same path on every host (default: python)
#
# `pocl-dist distill` with launch.ranks_with=deepspeed asks every host before it comes here. By itself the deepspeed
# launcher trains on this machine alone when the hostfile is missing.
# It ends ranks with SIGKILL 30 s after a signal, whatever they are saving: to stop, touch RUN/control/stop.
set -euo pipefail

PYTHON=${PYTHON:-python}
DEAD_LINK_SECONDS=${DEAD_LINK_SECONDS:-15}
: "${HOSTFILE:?is required}" "${NUM_NODES:?is required}" "${RANKS_PER_NODE:?is required}"
if ! [ -s "$HOSTFILE" ]; then
    echo "deepspeed.sh: hostfile $HOSTFILE does not exist or is empty" >&2
    exit 66
fi
for tool in ssh pdsh; do
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "deepspeed.sh: $tool is not installed" >&2
        exit 69
    fi
done
if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$HOSTFILE")
fi

# A password prompt is an error. A cut link ends ssh; without keepalives the launcher would wait for ever.
options="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveCountMax=3"
options+=" -o ServerAliveInterval=$((DEAD_LINK_SECONDS > 3 ? DEAD_LINK_SECONDS / 3 : 1)) -p ${SSH_PORT:-22}"
if [ -n "${SSH_CONFIG:-}" ]; then
    options+=" -F $SSH_CONFIG"
fi
export PDSH_SSH_ARGS_APPEND="$options"

# What the ranks are to find in their environment: the launcher passes on what stands in this file, in a folder of
# its own, instead of what may lie in the home or the working folder. Names that look like a secret are left out:
# the values stand in the command line of ssh.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export DS_ENV_FILE="$folder/.deepspeed_env"
"$PYTHON" - "$DS_ENV_FILE" <<'PYTHON_END'
import os, re, sys

passed = r"(PATH|PYTHONPATH|LD_LIBRARY_PATH|CUDA_HOME|DS_ACCELERATOR|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|XDG_CACHE_HOME)$"
prefixes = r"(GLOO|NCCL|TORCH|TRITON|HF|TRANSFORMERS|UCX|FI|POCL)_"
secret = r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|API_KEY"
more = set(filter(None, os.environ.get("LAUNCH_VARIABLES", "").split(",")))
with open(sys.argv[1], "w") as file:
    for name, value in sorted(os.environ.items()):
        is_passed = name in more or re.match(passed, name) or re.match(prefixes, name)
        if not is_passed or re.search(secret, name) or "\n" in value:
            continue
        # The launcher puts double quotes around it, and pdsh replaces % and a letter.
        escaped = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
        file.write(f"{name}={escaped}\n")
PYTHON_END

# --force_multi: also a single host is reached over ssh, it need not be this machine.
code=0
"$PYTHON" -m deepspeed.launcher.runner \
    --hostfile "$HOSTFILE" --num_nodes "$NUM_NODES" --num_gpus "$RANKS_PER_NODE" --force_multi --no_ssh_check \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-8476}" --launcher pdsh --log_level error \
    --no_local_rank --module pocl_dist "${STEP:-distill}" "$@" || code=$?
exit "$code"
