"""Files written whole or not at all, hashed, and listed in a manifest.

Every writer of the project goes through `atomic_write_*`: a temporary name in the same folder,
fsync of the file, one rename, fsync of the folder. An OSError always carries the path;
`explain_storage_error` makes one line of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

from pocl_dist.failpoints import failpoint

JSONValue = None | bool | int | float | str | list["JSONValue"] | dict[str, "JSONValue"]

MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.json.sha256"
# Files that change while a run lives or that only say how it went: never part of its result.
UNSEALED = ("lock", "status.json", MANIFEST_NAME, SEAL_NAME, "control")
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


def package_file(reference: str) -> Path:
    """Returns the path of `package:IMPORT_NAME/FILE`, a file or folder of an installed package.

    Raises FileNotFoundError with the reason; a path that leaves the package counts as not there.
    """
    name, _, file = reference.removeprefix("package:").partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise FileNotFoundError(f"the package {name!r} is not installed")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / file
        if file and path.exists() and path.resolve().is_relative_to(Path(folder).resolve()):
            return path
    raise FileNotFoundError(f"the package {name!r} holds no {file!r}")


def sha256_bytes(data: bytes) -> str:
    """Returns the hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the hex sha256 of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_of(value: JSONValue) -> str:
    """Returns a sha256 over the canonical JSON of `value`: equal values, equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256_bytes(text.encode())


def free_bytes(path: Path) -> int:
    """Returns the bytes a user may still write on the file system that holds `path`."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def explain_storage_error(error: OSError) -> str | None:
    """Returns one line about a full, read-only or failing disk; None for another error."""
    path = Path(str(error.filename or "."))
    if error.errno in _FULL_DISK:
        return f"disk full while writing {path}: {free_bytes(path.parent)} bytes free"
    if error.errno in _UNWRITABLE:
        return f"cannot write {path}: {error.strerror}"
    return None


def fsync_file(path: Path) -> None:
    """Makes the content of a file that another library wrote survive a power cut."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Creates or replaces `path` with what `write(handle)` writes; readers never see half of it."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            failpoint("atomic_write.open")
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        failpoint("atomic_write.before_rename")
        temporary.replace(path)
        failpoint("atomic_write.after_rename")
        fsync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write() does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Creates or replaces `path` with `text` in UTF-8."""
    atomic_write(path, lambda handle: handle.write(text.encode()))


def atomic_write_json(path: Path, value: object) -> None:
    """Creates or replaces `path` with `value` as indented JSON; NaN is refused (it is not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, JSONValue]:
    """Returns the JSON object in `path`; anything else is a ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested too deeply
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return cast("dict[str, JSONValue]", value)


def read_json_lines(path: Path) -> list[dict[str, JSONValue]]:
    """Returns the objects of a JSON-lines file; a torn last line (a killed writer) is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[:-1]  # what stands after the last newline was never finished
    return [json.loads(line) for line in complete if line.strip()]


# ---------------------------------------------------------------------------------------- manifest


def list_files(folder: Path) -> list[str]:
    """Returns the sealed files under `folder`, relative, sorted; not temporary or live ones."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        is_temporary = any(part.startswith(".tmp-") for part in relative.parts)
        if path.is_file() and not is_temporary and relative.parts[0] not in UNSEALED:
            found.append(relative.as_posix())
    return sorted(found)


def write_manifest(folder: Path) -> None:
    """Lists every file of a run directory with size and sha256, and seals the list with its hash.

    A file whose size and mtime are those of the last manifest keeps its
    hash: checkpoints are large.
    """
    known: dict[str, dict[str, JSONValue]] = {}
    if (folder / MANIFEST_NAME).exists():
        listed = cast("list[dict[str, JSONValue]]", read_json(folder / MANIFEST_NAME)["files"])
        known = {str(row["path"]): row for row in listed}
    files = []
    for name in list_files(folder):
        stat = (folder / name).stat()
        row = known.get(name)
        if row is None or (row["bytes"], row["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            row = {"path": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            row["sha256"] = sha256_file(folder / name)
        files.append(row)
    atomic_write_json(folder / MANIFEST_NAME, {"format": 1, "files": files})
    seal = sha256_file(folder / MANIFEST_NAME)
    atomic_write_text(folder / SEAL_NAME, f"{seal}  {MANIFEST_NAME}\n")


def verify_manifest(folder: Path) -> list[str]:
    """Returns one line per file that is missing, changed or unlisted; empty when all is well."""
    manifest_path, seal_path = folder / MANIFEST_NAME, folder / SEAL_NAME
    if not manifest_path.exists() or not seal_path.exists():
        return [f"{folder}: {MANIFEST_NAME} or {SEAL_NAME} is missing"]
    if seal_path.read_text(encoding="utf-8", errors="replace").split()[:1] != [
        sha256_file(manifest_path)
    ]:
        return [f"{MANIFEST_NAME}: does not match {SEAL_NAME}"]
    try:
        rows = cast("list[dict[str, object]]", read_json(manifest_path)["files"])
        listed = {str(row["path"]): (row["bytes"], row["sha256"]) for row in rows}
    except (KeyError, TypeError, ValueError):
        return [f"{MANIFEST_NAME}: is no manifest"]
    findings = []
    for name, (num_bytes, sha256) in listed.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            findings.append(f"{name!r}: leaves {folder}; it was not looked at")
        elif not path.is_file():
            findings.append(f"{name}: missing")
        elif path.stat().st_size != num_bytes:
            findings.append(f"{name}: {path.stat().st_size} bytes, expected {num_bytes}")
        elif sha256_file(path) != sha256:
            findings.append(f"{name}: content changed (sha256 differs)")
    unlisted = set(list_files(folder)) - set(listed)
    return findings + [f"{name}: not listed in {MANIFEST_NAME}" for name in sorted(unlisted)]
