"""The teacher cache on each node's own disk: read once from the shared one, then locally."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from pocl_dist.distributed.collectives import gather_texts
from pocl_dist.distributed.process_group import Rank, place_on_node
from pocl_dist.errors import MismatchError, StorageError
from pocl_dist.files import (
    JSONValue,
    atomic_write,
    atomic_write_json,
    digest_of,
    explain_storage_error,
    free_bytes,
)
from pocl_dist.shard_files import difference
from pocl_dist.teacher.cache_files import (
    CacheEntry,
    entry_names,
    find_damage,
    read_entry,
    tensor_file,
)

REMEDY = "`pocl-dist cache` (or `run`) computes what is missing or damaged"


def check_undamaged(folder: Path, rank: Rank) -> None:
    """Raises MismatchError (78) on all ranks when a file is not what was written. Collective.

    Each rank hashes its share of the files, so that the whole cache is read once.
    """
    mine = entry_names(folder)[rank.index :: rank.world_size]
    reasons = gather_texts("\n".join(d.reason for d in find_damage(folder, mine)), rank)
    _raise_damage(folder, reasons)


def copy_to_node(folder: Path, scratch: Path, rank: Rank) -> Path:
    """Returns the cache's copy below `scratch`, made by this node's ranks together. Collective.

    A file that lies there already is hashed, and copied again if it is not what was written. Raises
    MismatchError (78) when the cache itself is damaged, StorageError (74) when a node's disk is too
    small, both on all ranks.
    """
    try:
        entries = [read_entry(folder, name) for name in entry_names(folder)]
    except ValueError as error:  # a damaged description, which all ranks read
        raise MismatchError(f"{folder} is damaged; {REMEDY}:\n  {error}") from error
    made_of: list[JSONValue] = [[entry.name, entry.sha256] for entry in entries]
    target = scratch / "teacher_cache" / digest_of(made_of)[:16]
    _raise_problem(gather_texts(_prepare(target, entries), rank))
    index, num_here = place_on_node()
    full, damage = "", list[str]()
    try:
        for entry in entries[index::num_here]:
            damage += _copy_entry(folder, target, entry)
    except OSError as error:
        full = explain_storage_error(error) or str(error)
    _raise_problem(gather_texts(full, rank))
    _raise_damage(folder, gather_texts("\n".join(damage), rank))
    absent = [entry.name for entry in entries if not tensor_file(target, entry.name).exists()]
    if absent:  # the same on all ranks of the node, and a launcher treats its nodes alike
        raise StorageError(
            f"run.scratch_dir: rank {rank.index} lacks {len(absent)} of {len(entries)} files in "
            f"{target}: LOCAL_RANK and LOCAL_WORLD_SIZE are not those of the ranks of a node"
        )
    return target


def _prepare(target: Path, entries: Sequence[CacheEntry]) -> str:
    """Makes the folder; returns why the copies cannot lie there, nothing when they can."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make {target}: {error.strerror}"
    absent = sum(e.num_bytes for e in entries if not tensor_file(target, e.name).exists())
    free = free_bytes(target)
    if free >= absent:
        return ""
    return (
        f"{target} cannot hold a copy of the teacher cache: {absent} bytes needed, {free} bytes "
        "free; free some, name another disk, or set it to null"
    )


def _raise_problem(problems: Sequence[str]) -> None:
    found = [f"rank {index}: {text}" for index, text in enumerate(problems) if text]
    if found:
        raise StorageError(f"run.scratch_dir: {found[0]}")


def _copy_entry(folder: Path, target: Path, entry: CacheEntry) -> list[str]:
    """Copies an entry unless it is there; returns how the original differs, if it does."""
    source, copy = tensor_file(folder, entry.name), tensor_file(target, entry.name)
    if difference(copy, entry.num_bytes, entry.sha256) is not None:
        if not source.exists():
            return [f"{source}: missing"]
        atomic_write(copy, _pour(source), entry.num_bytes)
        if difference(copy, entry.num_bytes, entry.sha256) is not None:
            copy.unlink()
            found = difference(source, entry.num_bytes, entry.sha256)
            return [found or f"{copy}: is not what was copied: does the disk work?"]
    atomic_write_json(target / f"{entry.name}.json", entry.to_json())
    return []


def _pour(source: Path) -> Callable[[IO[bytes]], None]:
    def write(stream: IO[bytes]) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, stream, length=1 << 22)

    return write


def _raise_damage(folder: Path, reasons: Sequence[str]) -> None:
    found = [line for text in reasons for line in text.splitlines() if line.strip()]
    if found:
        raise MismatchError("\n  ".join([f"{folder} is damaged; {REMEDY}:", *found[:10]]))
