"""Checkpoints: whole tensors by name, in safetensors, sealed by hashes, verified when read.

DeepSpeed's own are pickles, tied to a world size, and its `latest` file can name a half-written one
(docs/decisions/checkpoints.md). Here each parameter, and each moment of AdamW, is gathered and
written once, by the rank whose turn it is, so that any number of ranks can read it back.

    step-00000042/rank-00000.safetensors ...   the tensors
    step-00000042/MANIFEST.json                size and sha256 of each, what it was made from, state
    step-00000042/MANIFEST.json.sha256         the manifest's own: nothing else would notice a bit

`checkpoint_write.py` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from pocl_dist.display.output import warn
from pocl_dist.distributed.collectives import barrier, broadcast_floats, gather_texts
from pocl_dist.distributed.engine import MOMENTS, set_adam_step, set_loss_scale_state
from pocl_dist.distributed.parameters import set_master_parameter, set_moment
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import MismatchError
from pocl_dist.files import JSONValue, read_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FORMAT = 2
MANIFEST = "MANIFEST.json"
SEAL = "MANIFEST.json.sha256"
WEIGHTS = "weights"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class _File:
    """One rank's tensors, as the manifest lists them."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are those of its manifest."""

    folder: Path
    step: int
    state: dict[str, JSONValue]  # the coordinator's progress; under `policy` that of the policy
    adam_step: int
    loss_scale: dict[str, JSONValue] | None  # of fp16
    files: tuple[_File, ...]

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole CPU tensor) of `weights`, `exp_avg`, `exp_avg_sq` or another kind."""
        from safetensors import safe_open

        for file in self.files:
            with safe_open(self.folder / file.name, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    if key.startswith(kind + "."):
                        yield key.removeprefix(kind + "."), handle.get_tensor(key)


def step_folder(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}"


def share_name(index: int) -> str:
    """Returns the name of the file that rank `index` writes."""
    return f"rank-{index:05d}.safetensors"


def committed_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, ascending; they are not verified."""
    found = (_STEP_FOLDER.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def seal_of(manifest: bytes) -> str:
    """Returns the content of the seal of a manifest; `sha256sum -c` reads it."""
    return f"{sha256_bytes(manifest)}  {MANIFEST}\n"


def read_checkpoint(folder: Path, run_digest: str) -> Checkpoint:
    """Returns what the manifest of a checkpoint says; the other files are not looked at.

    Raises ValueError, which names what is wrong, when the manifest is missing, changed, another
    step's, another run's (it was made from other inputs than those of `run_digest`) or lacks a key.
    """
    path = folder / MANIFEST
    try:
        content, seal = path.read_bytes(), (folder / SEAL).read_bytes()
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    if seal != seal_of(content).encode():
        raise ValueError(f"{path}: content changed (sha256 differs from {SEAL})")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: of format {manifest.get('format')}, this version reads {FORMAT}")
    try:
        digests = cast("Mapping[str, str]", manifest["digests"])
        checkpoint = Checkpoint(
            folder=folder,
            step=cast("int", manifest["step"]),
            state=cast("dict[str, JSONValue]", manifest["state"]),
            adam_step=cast("int", manifest["adam_step"]),
            loss_scale=cast("dict[str, JSONValue] | None", manifest["loss_scale"]),
            files=_files(cast("list[dict[str, JSONValue]]", manifest["files"])),
        )
        made_from = digests["run"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: lacks a key or has one of another type: {error}") from error
    if checkpoint.step != int(folder.name.removeprefix("step-")):
        raise ValueError(f"{path}: belongs to step {checkpoint.step}")
    if made_from != run_digest:
        raise ValueError(f"{path}: belongs to a run with another config, data, model or plan")
    return checkpoint


def _files(rows: list[dict[str, JSONValue]]) -> tuple[_File, ...]:
    """Returns the listed files; their names are those we give, so none leaves the folder."""
    for turn, row in enumerate(rows):
        if row["path"] != share_name(turn):
            raise TypeError(f"file {row['path']!r}")
    return tuple(_File(str(r["path"]), cast("int", r["bytes"]), str(r["sha256"])) for r in rows)


def damage_of(folder: Path, run_digest: str, turn: int = 0, num_turns: int = 1) -> str:
    """Returns what is wrong with a checkpoint; empty if nothing is.

    Of several ranks, each hashes the files whose turn it is.
    """
    try:
        checkpoint = read_checkpoint(folder, run_digest)
    except ValueError as error:
        return str(error)
    for file in checkpoint.files[turn::num_turns]:
        path = folder / file.name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != file.num_bytes:
            return f"{path}: {path.stat().st_size} bytes, its manifest says {file.num_bytes}"
        if sha256_file(path) != file.sha256:
            return f"{path}: content changed (sha256 differs from its manifest)"
    return ""


def find_checkpoint(
    folder: Path,
    rank: Rank,
    run_digest: str,
    on_damage: str = "fallback",
    only_step: int | None = None,
) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, or None when there is none. Collective.

    A damaged one is renamed to `bad-...` and the one before is used; with `on_damage` "fail" it
    stays and MismatchError (78) names what is wrong. Raises MismatchError (78) when
    there are checkpoints and none verifies: starting over would lose work in silence.
    """
    while True:
        found = [s for s in committed_steps(folder) if only_step is None or s == only_step]
        newest = int(broadcast_floats([found[-1] if found else -1], rank)[0])
        if newest < 0:
            damaged = [path.name for path in sorted(folder.glob("bad-*"))]
            if damaged:
                raise MismatchError(
                    f"{folder}: no checkpoint verifies; damaged: {', '.join(damaged)}"
                )
            return None
        path = step_folder(folder, newest)
        mine = damage_of(path, run_digest, rank.index, rank.world_size)
        damages = [text for text in gather_texts(mine, rank) if text]
        if not damages:
            return read_checkpoint(path, run_digest)
        if on_damage == "fail":
            raise MismatchError(f"damaged checkpoint: {damages[0]}")
        if rank.is_main:
            _set_aside(path)
            warn(f"damaged checkpoint set aside: {damages[0]}")
        barrier(rank)


def _set_aside(path: Path) -> None:
    """Renames a damaged checkpoint; that of the same step may have been damaged before."""
    target = path.with_name(f"bad-{path.name}")
    again = 2
    while target.exists():
        target = path.with_name(f"bad-{path.name}-{again}")
        again += 1
    path.rename(target)


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
        set_loss_scale_state(engine, checkpoint.loss_scale)


def agree_on_digest(digest: str, rank: Rank, what: str) -> None:
    """Raises MismatchError (78), on all, naming ranks whose `what` is not rank 0's. Collective."""
    rows = gather_texts(digest, rank)
    strays = [str(index) for index, row in enumerate(rows) if row != rows[0]]
    if strays:
        raise MismatchError(f"rank(s) {', '.join(strays)} started with another {what} than rank 0")
