"""The sealed list of a run directory's files. `manifest.json.sha256` is the hash of the list.

A file whose size and time of change (`mtime_ns`) are those of the last list keeps its hash, because
checkpoints are large. So a bit that a disk loses between two steps is not taken for a new content:
the old hash stays, and `verify`, which reads everything, finds it.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from pocl_dist.errors import MismatchError
from pocl_dist.files import (
    TEMPORARY,
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    read_json,
    sha256_file,
)
from pocl_dist.versions import RUN_FORMAT, versions

MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.json.sha256"
# The runs of a comparison, which have manifests of their own.
NESTED = ("shared", "runs")
# `status.json` and `rows` have digests of their own; `rows` follows the source, also when the run
# is refused for that. Lock and requests are gone when a run has ended.
UNSEALED = ("lock", "status.json", MANIFEST_NAME, SEAL_NAME, "control", "launch", "rows", *NESTED)


def walk(folder: Path, on_error: Callable[[OSError], None]) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (relative name, its lstat) of all that is no folder, sorted. No link is followed."""
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*files, *linked]):
            path = Path(parent, name)
            try:
                found = path.lstat()
            except FileNotFoundError:  # removed since it was listed
                continue
            yield path.relative_to(folder).as_posix(), found


def is_temporary(name: str) -> bool:
    """Returns whether a relative name is that of something unfinished."""
    return any(part.startswith(TEMPORARY) for part in name.split("/"))


def is_unsealed(name: str) -> bool:
    """Returns whether a relative name is that of something that the manifest does not list."""
    return name.split("/")[0] in UNSEALED


def list_files(folder: Path) -> list[str]:
    """Returns the files under `folder` that belong into its manifest, relative, sorted."""

    def fail(error: OSError) -> None:
        raise error

    return sorted(
        name
        for name, found in walk(folder, fail)
        if stat.S_ISREG(found.st_mode) and not is_temporary(name) and not is_unsealed(name)
    )


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left half done. For the holder of the lock only."""
    for path in sorted(folder.rglob(f"{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def seal_text(folder: Path) -> str:
    """Returns what `manifest.json.sha256` must hold, as `sha256sum -c` reads it."""
    return f"{sha256_file(folder / MANIFEST_NAME)}  {MANIFEST_NAME}\n"


def read_rows(folder: Path) -> dict[str, dict[str, JSONValue]]:
    """Returns {relative name: its row} of the manifest; MismatchError (78) when it is none."""
    path = folder / MANIFEST_NAME
    try:
        rows = cast("list[dict[str, JSONValue]]", read_json(path)["files"])
        return {str(row["path"]): {**row, "sha256": row["sha256"]} for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{path}: is no manifest ({error!r})") from error


def write_manifest(folder: Path) -> None:
    """Lists every file of a run directory with size and sha256, and seals the list."""
    known = read_rows(folder) if (folder / MANIFEST_NAME).exists() else {}
    files = []
    for name in list_files(folder):
        found = (folder / name).stat()
        row = known.get(name, {})
        if (row.get("bytes"), row.get("mtime_ns")) != (found.st_size, found.st_mtime_ns):
            row = {"path": name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
            row["sha256"] = sha256_file(folder / name)
        files.append(row)
    value = {"format": RUN_FORMAT, "versions": versions(), "files": files}
    atomic_write_json(folder / MANIFEST_NAME, value)
    atomic_write_text(folder / SEAL_NAME, seal_text(folder))
