"""This machine: text encoding, open files, shared memory, temporary and scratch folders."""

from __future__ import annotations

import locale
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.checks.disk import size
from pocl_dist.cluster.doctor.finding import Finding, ok, warning
from pocl_dist.distributed.ray_session import OBJECT_STORE_BYTES
from pocl_dist.distributed.scratch import scratch_folder
from pocl_dist.files import writing

ENOUGH_FILES = 4096
SHARED_MEMORY = Path("/dev/shm")


def text_encoding(case: Case) -> Iterator[Finding]:
    """Whether this process writes UTF-8."""
    name = locale.getpreferredencoding(False)
    if name.lower().replace("-", "") == "utf8":
        yield ok(f"text is {name}")
        return
    yield warning(
        f"the encoding of text is {name}, not UTF-8",
        "Lines of a step or rows that are shown may hold signs that it cannot write.",
        "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)",
    )


def limits(case: Case) -> Iterator[Finding]:
    """Open files; Ray, the ranks and their sockets need thousands on a large node."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        yield ok(f"{soft} files may be open at once")
        return
    top = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    is_low = hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES
    higher = 65535 if hard == resource.RLIM_INFINITY else min(65535, hard)
    yield warning(
        f"only {soft} files may be open at once (the hard limit is {top})",
        "Ray and NCCL open many; a large node ends with 'too many open files'.",
        "let the hard limit be raised (limits.conf, LimitNOFILE, --ulimit nofile of a container)"
        if is_low
        else f"ulimit -n {higher}",
    )


def shared_memory(case: Case) -> Iterator[Finding]:
    """The size of /dev/shm: Ray's object store and NCCL's buffers."""
    if not SHARED_MEMORY.is_dir() or not os.access(SHARED_MEMORY, os.W_OK):
        yield warning(
            f"{SHARED_MEMORY} is not there or cannot be written",
            "Ray then keeps its objects on disk, and NCCL cannot pass data between GPUs.",
            "mount a tmpfs there (containers: --shm-size=8g, Kubernetes: emptyDir medium Memory)",
        )
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < 2 * OBJECT_STORE_BYTES:
        yield warning(
            f"{SHARED_MEMORY} has {size(free)} free",
            f"Ray's object store takes {size(OBJECT_STORE_BYTES)}, NCCL more; containers often "
            "have 64 MB.",
            "containers: --shm-size=8g; Kubernetes: an emptyDir with medium Memory",
        )
    else:
        yield ok(f"{SHARED_MEMORY} has {size(free)} free")


def scratch(case: Case) -> Iterator[Finding]:
    """Temporary folder and `run.scratch_dir`: can be written, and are on a disk of this node."""
    chosen = case.config.run.scratch_dir
    for name, folder in (("temporary folder", tempfile.gettempdir()), ("run.scratch_dir", chosen)):
        if folder is None:
            continue
        path = Path(folder) if name != "run.scratch_dir" else scratch_folder(folder)
        while not path.exists():
            path = path.parent
        with writing(path):
            shutil.rmtree(tempfile.mkdtemp(prefix=".tmp-doctor-", dir=path))
        yield ok(f"{name} {folder}: {size(shutil.disk_usage(path).free)} free")
