"""The folder of the run: can it be written, on which file system, with which promises."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, error, ok, warning
from pocl_dist.files import atomic_write_text, new_folder, writing

NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "9p", "weka", "panfs")
LOCAL_MEMORY = ("tmpfs", "ramfs", "overlay")


def file_system(path: Path) -> tuple[str, str]:
    """Returns (kind, mount point) of the file system that holds `path`."""
    best = ("unknown", "/")
    real = path.resolve()
    mounts = Path("/proc/self/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, mount, kind, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")
        if real.is_relative_to(mount) and len(mount) >= len(best[1]):
            best = (kind, mount)
    return best


def writable(case: Case) -> Iterator[Finding]:
    """Writes, syncs and renames in a scratch folder beside the run, and reads it back."""
    parent = case.existing_parent
    kind, mount = file_system(parent)
    with writing(parent):
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-doctor-", dir=parent))
    try:
        problem = _try_renames(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if problem:
        yield error(74, f"{parent} ({kind} at {mount}): {problem}")
        return
    yield ok(f"{parent} can be written; rename and fsync work ({kind} at {mount})")
    if kind in LOCAL_MEMORY:
        yield warning(
            f"{parent} lies on {kind} ({mount})",
            "It is gone when the machine or container ends, and no other node sees it.",
            "set run_dir to a folder on a disk, or on the shared file system of the cluster",
        )
    elif case.config.launch.nodes > 1 and not kind.startswith(NETWORK):
        yield warning(
            f"{parent} lies on {kind} ({mount}), which looks like a disk of this machine",
            f"All {case.config.launch.nodes} nodes write into one run directory.",
            "set run_dir to a folder on the shared file system",
        )


def _try_renames(folder: Path) -> str:
    """Returns what a run needs and this file system does not do; empty when all is well."""
    file = folder / "file"
    atomic_write_text(file, "first")
    with file.open() as reader:
        atomic_write_text(file, "second")  # renamed over a file that is open
        if file.read_text() != "second" or reader.read() != "first":
            return "a file that was renamed over another is not seen whole"
    with new_folder(folder / "step") as temporary:
        (temporary / "weights").write_text("w")
    if not (folder / "step" / "weights").exists():
        return "a renamed folder does not hold its files"
    handle = os.open(folder / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.close(handle)
    try:
        os.close(os.open(folder / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return ""
    return "a file can be created twice: two runs could both take the lock"
