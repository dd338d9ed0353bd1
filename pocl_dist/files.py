"""Files and folders written whole or not at all, and their hashes.

Every writer of the project goes through `atomic_write_*` or `new_folder`: a temporary name in the
same folder, fsync of what was written, one rename, fsync of the folder. What goes wrong is a
WriteError with the path; `explain_storage_error` makes one line of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

from pocl_dist.failpoints import failpoint

JSONValue = None | bool | int | float | str | list["JSONValue"] | dict[str, "JSONValue"]

# How the name of what is not finished begins; nothing of that name counts.
TEMPORARY = ".tmp-"
_FULL_DISK = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota exceeded"}
_UNWRITABLE = {errno.EROFS, errno.EFBIG}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EIO}
# How libraries in Rust and C++ tell the system's error number: in the text of their own errors.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
# What is asked before something under a folder takes its final name; see `guarded`.
_guards: dict[Path, Callable[[], None]] = {}


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


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical_json(value: JSONValue) -> str:
    """Returns the one text that stands for equal values."""
    return _CANONICAL.encode(value)


def digest_of(value: JSONValue) -> str:
    """Returns a sha256 over the canonical JSON of `value`: equal values, equal digests."""
    return sha256_bytes(canonical_json(value).encode())


def free_bytes(path: Path) -> int:
    """Returns the bytes a user may still write on the file system that holds `path`."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


class WriteError(OSError):
    """A file or folder could not be written: `filename` is its final name."""

    num_bytes: int | None = None
    """What it needed, where that is known."""


def _write_error(number: int, path: Path, num_bytes: int | None) -> WriteError:
    error = WriteError(number, os.strerror(number), str(path))
    error.num_bytes = num_bytes
    return error


@contextlib.contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turns what the system refuses while `path` is written into a WriteError that names it."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno is None:  # not the system's word: a library uses the class for its own
            raise
        raise _write_error(error.errno, path, num_bytes) from error
    except Exception as error:
        found = _ERROR_NUMBER.search(str(error))
        if found is None:
            raise
        raise _write_error(int(found[1] or found[2]), path, num_bytes) from error


def require_free(path: Path, num_bytes: int) -> None:
    """Raises WriteError (disk full) when the disk of `path` has less than `num_bytes` left."""
    if free_bytes(path) < num_bytes:
        raise _write_error(errno.ENOSPC, path, num_bytes)


def explain_storage_error(error: OSError) -> str | None:
    """Returns one line about a full, read-only or failing disk; None for another error."""
    path = Path(str(error.filename or "."))
    if error.errno in _FULL_DISK:
        num_bytes = error.num_bytes if isinstance(error, WriteError) else None
        needed = "" if num_bytes is None else f"{num_bytes} bytes needed, "
        free = free_bytes(path.parent)
        return f"{_FULL_DISK[error.errno]} while writing {path}: {needed}{free} bytes free"
    if isinstance(error, WriteError) or error.errno in _UNWRITABLE:
        return f"cannot write {path}: {error.strerror}"
    if error.errno in _UNUSABLE:
        return f"cannot use {path}: {error.strerror}"
    return None


def make_private() -> None:
    """Lets this process create files for its user only: 0600, folders 0700. Children take it over.

    Runs hold rows and weights; not each library can be told the mode of its files.
    """
    os.umask(0o077)


@contextlib.contextmanager
def guarded(root: Path, check: Callable[[], None]) -> Iterator[None]:
    """While the context lasts, `check` is called before a file under `root` takes its final name.

    What it raises keeps the file from being committed.
    """
    resolved = root.resolve()
    _guards[resolved] = check
    try:
        yield
    finally:
        del _guards[resolved]


def _check_commit(path: Path) -> None:
    for root, check in _guards.items():
        if path.resolve().is_relative_to(root):
            check()


def fsync_path(folder: Path) -> None:
    """Makes renames inside `folder` (or the content of a file) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(
    path: Path, write: Callable[[IO[bytes]], object], num_bytes: int | None = None
) -> None:
    """Creates or replaces `path` with what `write(handle)` writes; readers never see half of it.

    `num_bytes`, if known, is named when the disk is full.
    """
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{writer}")
    with writing(path, num_bytes):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                failpoint("atomic_write.open")
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            failpoint("atomic_write.before_rename")
            _check_commit(path)
            temporary.replace(path)
            failpoint("atomic_write.after_rename")
            fsync_path(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the error above is the one that matters
                temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Creates or replaces `path` with `text` in UTF-8."""
    data = text.encode()
    atomic_write(path, lambda handle: handle.write(data), len(data))


def json_text(value: object) -> str:
    """Returns `value` as the JSON that is written; NaN is a ValueError (it is not JSON)."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def atomic_write_json(path: Path, value: object) -> None:
    """Creates or replaces `path` with `value` as indented JSON."""
    atomic_write_text(path, json_text(value))


@contextlib.contextmanager
def new_folder(target: Path, keeps_existing: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `target`, synced, when the context ends well.

    Otherwise it is removed. `keeps_existing`: one that another process has made meanwhile stays.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    with writing(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                fsync_path(file)
            fsync_path(temporary)
            failpoint("new_folder.before_rename")
            _check_commit(target)
            if not (keeps_existing and target.exists()):
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                fsync_path(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
