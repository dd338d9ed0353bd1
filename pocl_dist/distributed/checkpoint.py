"""Checkpoints: whole tensors by name, in safetensors, committed by one rename, verified when read.

DeepSpeed's own are pickles, tied to a world size, and its `latest` file can name a half-written one
(docs/decisions/checkpoints.md). Here each parameter, and each moment of AdamW, is gathered and
written once, by the rank whose turn it is, so that any number of ranks can read it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from pocl_dist.distributed.collectives import barrier, broadcast_floats, gather_texts
from pocl_dist.distributed.engine import MOMENTS, adam_step, set_adam_step
from pocl_dist.distributed.parameters import (
    master_parameters,
    moments,
    set_master_parameter,
    set_moment,
)
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import MismatchError, StorageError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    explain_storage_error,
    free_bytes,
    fsync_folder,
    read_json,
    sha256_file,
)
from pocl_dist.guards import inside

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST = "MANIFEST.json"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are those of its manifest."""

    folder: Path
    step: int
    state: dict[str, JSONValue]  # the coordinator's progress; under `policy` that of the policy
    adam_step: int
    loss_scale: float | None

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole CPU tensor) of `weights`, `exp_avg`, `exp_avg_sq` or another kind."""
        from safetensors import safe_open

        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    if key.startswith(kind + "."):
                        yield key.removeprefix(kind + "."), handle.get_tensor(key)


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _collect_share(engine: DeepSpeedEngine, rank: Rank) -> dict[str, torch.Tensor]:
    """Returns this rank's share of all tensors, on CPU. Collective."""
    share = {}
    sources = [
        (WEIGHTS, master_parameters(engine)),
        *((key, moments(engine, key)) for key in MOMENTS),
    ]
    for kind, named in sources:
        for turn, (name, value) in enumerate(named):
            if turn % rank.world_size == rank.index:
                share[f"{kind}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return share


def save_checkpoint(
    engine: DeepSpeedEngine,
    folder: Path,
    step: int,
    state: dict[str, JSONValue],
    rank: Rank,
    extra: Mapping[str, torch.Tensor] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> int:
    """Writes and commits the checkpoint of `step`; returns its bytes. Collective.

    `extra` are further CPU tensors by `KIND.NAME`, the same on all ranks; rank 0 writes them.
    Rank 0 calls `before_commit` just before the rename: if it raises, nothing is committed.

    Raises StorageError (74) on all ranks when one cannot write; what was committed before stays.
    """
    temporary = folder / f".tmp-step-{step:08d}"
    if rank.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(rank)
    share = _collect_share(engine, rank)
    if rank.is_main:
        share |= extra or {}
    row, problem = _write_share(share, temporary / f"rank-{rank.index:05d}.safetensors")
    problems = [text for text in gather_texts(problem, rank) if text]
    rows = gather_texts(json.dumps(row), rank)
    if problems:
        if rank.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(problems[0])
    files = [json.loads(text) for text in rows]
    if rank.is_main:
        scale = getattr(engine.optimizer, "cur_scale", None) if engine.fp16_enabled() else None
        manifest: dict[str, JSONValue] = {
            "format": 1,
            "step": step,
            "world_size": rank.world_size,
            "adam_step": adam_step(engine),
            "loss_scale": None if scale is None else float(scale),
            "state": state,
            "files": files,
        }
        atomic_write_json(temporary / MANIFEST, manifest)
        before_commit()
        target = folder / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync_folder(folder)
    barrier(rank)
    return sum(row["bytes"] for row in files)


def _write_share(share: dict[str, torch.Tensor], file: Path) -> tuple[dict[str, JSONValue], str]:
    """Writes one rank's tensors; returns (the file's row of the manifest, what went wrong)."""
    from safetensors.torch import save_file

    needed = sum(tensor.numel() * tensor.element_size() for tensor in share.values())
    free = free_bytes(file.parent)
    if free < needed:
        return {}, f"checkpoint needs {needed} bytes on this rank, {free} are free at {file.parent}"
    try:
        save_file(share, file)
        _fsync_file(file)
        digest = sha256_file(file)
    except OSError as error:
        return {}, explain_storage_error(error) or str(error)
    except Exception as error:  # safetensors wraps a full disk in an error of its own
        return {}, f"cannot write {file}: {error} ({free_bytes(file.parent)} bytes free)"
    return {"path": file.name, "bytes": file.stat().st_size, "sha256": digest}, ""


def prune_checkpoints(folder: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and those of `keep_steps`. Rank 0 only."""
    steps = sorted(folder.glob("step-*"))
    for old in steps[:-keep_last]:
        if int(old.name.removeprefix("step-")) not in keep_steps:
            shutil.rmtree(old, ignore_errors=True)


def _damage(folder: Path, rank: Rank) -> str:
    """Returns what is wrong with this rank's share of a checkpoint's files; empty if nothing is."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"
    files = cast("list[dict[str, JSONValue]]", manifest["files"])
    for turn, row in enumerate(files):
        path = inside(folder, str(row["path"]), str(folder / MANIFEST))  # 77, on every rank
        if turn % rank.world_size != rank.index:
            continue
        if not path.is_file() or path.stat().st_size != row["bytes"]:
            return f"{path}: missing or of another size than its manifest says"
        if sha256_file(path) != row["sha256"]:
            return f"{path}: content changed (sha256 differs from its manifest)"
    return ""


def find_checkpoint(
    folder: Path, rank: Rank, on_damage: str = "fallback", only_step: int | None = None
) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, or None when there is none. Collective.

    A damaged one is renamed to `bad-...` and the one before is used; with `on_damage` "fail" it
    stays and MismatchError (78) names what is wrong. Raises MismatchError (78) when
    there are checkpoints and none verifies: starting over would lose work in silence.
    """
    while True:
        found = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
        if only_step is not None:
            found = [step for step in found if step == only_step]
        newest = int(broadcast_floats([found[-1] if found else -1], rank)[0])
        if newest < 0:
            damaged = [path.name for path in sorted(folder.glob("bad-*"))]
            if damaged:
                raise MismatchError(
                    f"{folder}: no checkpoint verifies; damaged: {', '.join(damaged)}"
                )
            return None
        path = folder / f"step-{newest:08d}"
        damages = [text for text in gather_texts(_damage(path, rank), rank) if text]
        if not damages:
            break
        if on_damage == "fail":
            raise MismatchError(f"damaged checkpoint: {damages[0]}")
        if rank.is_main:
            path.rename(folder / f"bad-{path.name}")
            print(f"WARNING: damaged checkpoint set aside: {damages[0]}", flush=True)
        barrier(rank)
    manifest = read_json(path / MANIFEST)
    scale = cast("float | None", manifest["loss_scale"])
    state = cast("dict[str, JSONValue]", manifest["state"])
    return Checkpoint(path, newest, state, int(cast("int", manifest["adam_step"])), scale)


def restore_optimizer(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Sets master weights, moments, step count and loss scale; the weights are loaded before."""
    parameters = dict(engine.module.named_parameters())
    for name, value in checkpoint.tensors(WEIGHTS):
        set_master_parameter(parameters[name], value)
    for key in MOMENTS:
        for name, value in checkpoint.tensors(key):
            set_moment(engine, parameters[name], key, value)
    set_adam_step(engine, checkpoint.adam_step)
    if checkpoint.loss_scale is not None:
        engine.optimizer.loss_scaler.cur_scale = checkpoint.loss_scale


def agree_on_digest(digest: str, rank: Rank, what: str) -> None:
    """Raises MismatchError (78), on all, naming ranks whose `what` is not rank 0's. Collective."""
    rows = gather_texts(digest, rank)
    strays = [str(index) for index, row in enumerate(rows) if row != rows[0]]
    if strays:
        raise MismatchError(f"rank(s) {', '.join(strays)} started with another {what} than rank 0")
