"""Checkpoints are written beside the training and committed by one rename, or leave no trace.

1. Rank 0 compares what all ranks need with the free space, before anything is written.
2. Each parameter and moment is gathered, and copied to host memory by the rank whose turn it is.
   With asynchronous saving, training stands still for this alone.
3. A thread of each rank writes and fsyncs its file, then `rank-N.json`, the file's row of the
   manifest or what went wrong.
4. Rank 0's thread waits for all rows, on disk: a thread may take part in no collective while the
   main one trains. Then the manifest, its seal, fsync of the folder, the fence, one rename, fsync
   of the parent. Only then may older checkpoints be removed.

Host memory: the copy is 12 bytes per trained parameter over the number of ranks, and stays until
its file is written. One save is under way at a time: a second waits for the first.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from pocl_dist import errors
from pocl_dist.distributed.checkpoint import FORMAT, share_name
from pocl_dist.distributed.checkpoint_commit import Committed, Save, commit, problem_of, row_name
from pocl_dist.distributed.checkpoint_share import (
    collect_share,
    num_bytes_of,
    package_versions,
    write_share,
)
from pocl_dist.distributed.collectives import gather_texts
from pocl_dist.distributed.engine import adam_step, loss_scale_state
from pocl_dist.distributed.process_group import Rank
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    explain_storage_error,
    free_bytes,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class CheckpointWriter:
    """Saves into `folder`, one save at a time. Every rank has one, and they act together."""

    def __init__(self, folder: Path, rank: Rank, before_commit: Callable[[], None]) -> None:
        """Removes what interrupted saves left. Collective.

        Rank 0's thread calls `before_commit` just before the rename; if it raises, nothing is
        committed and all ranks raise that error.
        """
        self._folder = folder
        self._rank = rank
        self._before_commit = before_commit
        # A writer that was thought dead may wake up: it must not find our files under its names.
        self._token = gather_texts(uuid.uuid4().hex[:8], rank)[0]
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        if rank.is_main:
            for stale in folder.glob(".tmp-*"):
                stale.unlink() if stale.is_file() else shutil.rmtree(stale, ignore_errors=True)

    def start(
        self,
        engine: DeepSpeedEngine,
        step: int,
        state: Mapping[str, JSONValue],
        about: Mapping[str, JSONValue],
        extra: Mapping[str, torch.Tensor],
    ) -> None:
        """Copies the state to host memory and begins to write it; returns after the copy.

        `about` are further keys of the manifest; `extra` further CPU tensors by `KIND.NAME`, the
        same on all ranks. Collective.

        Raises StorageError (74) on all ranks when the space would not be enough.
        """
        assert self._save is None, "the save before was not waited for"
        started = time.monotonic()
        temporary = self._folder / f".tmp-step-{step:08d}-{self._token}"
        num_needed = num_bytes_of(engine, extra)
        problem = _make_room(temporary, num_needed) if self._rank.is_main else {}
        self._raise_first(problem)
        manifest: dict[str, JSONValue] = {
            "format": FORMAT,
            "step": step,
            "world_size": self._rank.world_size,
            **about,
            "adam_step": adam_step(engine),
            "loss_scale": loss_scale_state(engine),
            "versions": package_versions(),
            "state": json.loads(json.dumps(state)),  # a copy: training goes on
        }
        share = collect_share(engine, self._rank)
        if self._rank.is_main:
            share |= extra
        self._save = Save(step, temporary, share, manifest, num_needed, started)
        self._thread = threading.Thread(target=self._write, args=(self._save,), daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Returns whether this rank knows that the save under way cannot succeed."""
        return self._save is not None and bool(self._save.problem)

    @property
    def is_under_way(self) -> bool:
        """Returns whether a save has begun and, as far as this rank knows, is not in place."""
        return self._save is not None and self._save.committed is None

    @property
    def committed(self) -> Committed | None:
        """Returns the save under way if it is in place already; on rank 0 only."""
        return None if self._save is None else self._save.committed

    def finish(self) -> Committed | None:
        """Waits for the save under way; returns it on rank 0, None elsewhere. Collective.

        Raises on all ranks what went wrong on any: StorageError (74), or what `before_commit`
        raised. Nothing of the save is left then, and what was committed before stays.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        save.is_written.wait()
        # Told here, the rows need not become visible to rank 0 through a network file system.
        told = [
            cast("dict[str, dict[str, JSONValue]]", json.loads(text))
            for text in gather_texts(
                json.dumps({"row": save.row, "problem": save.problem}), self._rank
            )
        ]
        save.rows = [values["row"] for values in told]
        failed = next((values["problem"] for values in told if values["problem"]), None)
        if failed is not None:
            save.problem = save.problem or cast("dict[str, str]", failed)
        save.is_told.set()
        assert self._thread is not None
        self._thread.join()
        if self._rank.is_main and save.committed is None:
            shutil.rmtree(save.temporary, ignore_errors=True)
        self._raise_first(save.problem)
        return save.committed

    def _raise_first(self, problem: dict[str, str]) -> None:
        """Raises the problem of the lowest rank that has one, on all ranks. Collective."""
        for text in gather_texts(json.dumps(problem), self._rank):
            found = json.loads(text)
            if found:
                raise getattr(errors, found["kind"], RuntimeError)(found["text"])

    def _write(self, save: Save) -> None:
        """Writes this rank's share and, on rank 0, commits: the work of the thread."""
        row_path = save.temporary / row_name(self._rank.index)
        try:
            save.row = write_share(save.share, save.temporary / share_name(self._rank.index))
            save.share = {}  # gives the memory back
            atomic_write_json(row_path, save.row)
        except Exception as error:
            save.problem = problem_of(error, save)
            with contextlib.suppress(OSError):  # rank 0 learns it now, or in `finish`
                atomic_write_json(row_path, {"problem": save.problem})
        finally:
            save.is_written.set()
        if not self._rank.is_main or save.problem:
            return
        try:
            commit(save, self._rank.world_size, self._before_commit)
        except Exception as error:
            save.problem = problem_of(error, save)


def _make_room(temporary: Path, num_needed: int) -> dict[str, str]:
    """Creates the folder if all ranks' files will fit; returns what is in the way."""
    # The run directory is one file system for all ranks: they read each other's files.
    free = free_bytes(temporary.parent)
    if free < num_needed:
        text = f"checkpoint needs {num_needed} bytes, {free} are free at {temporary.parent}"
        return {"kind": "StorageError", "text": text}
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        return {"kind": "StorageError", "text": explain_storage_error(error) or str(error)}
    return {}
