"""Turns what the ranks wrote into a checkpoint, by one rename, and removes old ones.

All on rank 0, and without a collective: it runs in a thread while the main one trains.
"""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from pocl_dist import errors
from pocl_dist.display.output import warn
from pocl_dist.distributed.checkpoint import (
    MANIFEST,
    SEAL,
    committed_steps,
    seal_of,
    step_folder,
)
from pocl_dist.failpoints import failpoint
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    explain_storage_error,
    free_bytes,
    fsync_path,
    read_json,
)


@dataclass(frozen=True)
class Committed:
    """A save that is in place."""

    step: int
    num_bytes: int
    seconds: float  # from the first gather to the rename


@dataclass
class Save:
    """A save under way, seen by the main thread and by the one that writes."""

    step: int
    temporary: Path
    share: dict[str, torch.Tensor]
    manifest: dict[str, JSONValue]
    num_needed: int
    started: float
    row: dict[str, JSONValue] = field(default_factory=dict)
    problem: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, JSONValue]] = field(default_factory=list)
    is_written: threading.Event = field(default_factory=threading.Event)  # this rank's share
    is_told: threading.Event = field(default_factory=threading.Event)  # how the others fared
    committed: Committed | None = None


def row_name(index: int) -> str:
    """Returns the name of the file in which rank `index` says how its write went."""
    return f"rank-{index:05d}.json"


def commit(save: Save, world_size: int, before_commit: Callable[[], None]) -> None:
    """Turns the temporary folder, once every rank has written, into a checkpoint."""
    folder = save.temporary.parent
    files = _all_rows(save, world_size)
    if save.problem:
        return
    failpoint("checkpoint.before_manifest")
    for index in range(world_size):
        (save.temporary / row_name(index)).unlink()
    num_bytes = sum(cast("int", row["bytes"]) for row in files)
    seconds = time.monotonic() - save.started
    rows = cast("list[JSONValue]", files)
    manifest = {**save.manifest, "bytes": num_bytes, "seconds": seconds, "files": rows}
    atomic_write_json(save.temporary / MANIFEST, manifest)
    atomic_write_text(save.temporary / SEAL, seal_of((save.temporary / MANIFEST).read_bytes()))
    fsync_path(save.temporary)
    target = step_folder(folder, save.step)
    before_commit()
    failpoint("checkpoint.before_rename")
    if target.exists():  # of a course that was rewound
        _remove(target)
    save.temporary.rename(target)
    failpoint("checkpoint.after_rename")
    fsync_path(folder)
    save.committed = Committed(save.step, num_bytes, time.monotonic() - save.started)


def _all_rows(save: Save, world_size: int) -> list[dict[str, JSONValue]]:
    """Waits until every rank has written; returns their rows, or notes what went wrong."""
    found: dict[int, dict[str, JSONValue]] = {}
    pause_seconds = 0.001
    while len(found) < world_size:
        for index in set(range(world_size)) - set(found):
            path = save.temporary / row_name(index)
            if not path.exists():
                continue
            found[index] = read_json(path)
            if "problem" in found[index]:
                save.problem = cast("dict[str, str]", found[index]["problem"])
                return []
        if save.is_told.wait(pause_seconds):
            return save.rows
        pause_seconds = min(2.0 * pause_seconds, 0.1)
    return [found[index] for index in sorted(found)]


def problem_of(error: Exception, save: Save) -> dict[str, str]:
    """Returns an error in the form in which ranks tell each other of it."""
    from safetensors import SafetensorError

    if isinstance(error, errors.PoclError):
        return {"kind": type(error).__name__, "text": str(error)}
    if not isinstance(error, OSError | SafetensorError):
        return {"kind": "RuntimeError", "text": "".join(traceback.format_exception(error))}
    cause = explain_storage_error(error) if isinstance(error, OSError) else None
    free = free_bytes(save.temporary.parent)
    text = (
        f"checkpoint needs {save.num_needed} bytes, {free} are free at {save.temporary.parent}: "
        f"{cause or error}; checkpoints before it are intact"
    )
    return {"kind": "StorageError", "text": text}


def _remove(folder: Path) -> None:
    """Removes a checkpoint; killed in the middle, it leaves no half of one under its name."""
    grave = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(grave, ignore_errors=True)
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def prune_checkpoints(folder: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and those of `keep_steps`. Rank 0 only.

    What cannot be removed is told, and stays: the new checkpoint is good all the same.
    """
    failpoint("checkpoint.before_prune")
    for step in committed_steps(folder)[:-keep_last]:
        if step in keep_steps:
            continue
        try:
            _remove(step_folder(folder, step))
        except OSError as error:
            warn(f"an old checkpoint was not removed: {error}")
