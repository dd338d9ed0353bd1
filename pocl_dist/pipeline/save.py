"""What the train loop leaves on disk: checkpoints on the way, the export at the end."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch

from pocl_dist.display.output import say
from pocl_dist.distributed.checkpoint import (
    committed_steps,
    find_checkpoint,
    read_checkpoint,
    step_folder,
)
from pocl_dist.distributed.checkpoint_commit import Committed, prune_checkpoints
from pocl_dist.distributed.collectives import barrier
from pocl_dist.distributed.process_group import torch_dtype
from pocl_dist.files import JSONValue, digest_of
from pocl_dist.pipeline.export import write_export
from pocl_dist.pipeline.inputs import finished_record
from pocl_dist.pipeline.model_card import model_card
from pocl_dist.pipeline.run_directory import ATTEMPT_VARIABLE

if TYPE_CHECKING:
    from pocl_dist.pipeline.training import Training


@dataclass(frozen=True)
class SaveUnderWay:
    """What is told of a save when it is in place."""

    stage: int
    pause_seconds: float  # that training stood still so far
    was_asked: bool  # by `control/save`


def is_save_wanted(training: Training) -> bool:
    """Returns whether a checkpoint is wanted besides those of the schedule. Rank 0 only.

    By the save file, by `checkpoint.every_minutes`, or to tell all ranks of a write that failed.
    """
    _tell_committed(training)
    if training.writer.is_under_way:
        return training.writer.has_failed
    minutes = training.config.checkpoint.every_minutes
    seconds = time.monotonic() - training.saved_at_seconds
    return training.run.save_file.exists() or (minutes is not None and seconds >= 60.0 * minutes)


def save(training: Training) -> None:
    """Takes a checkpoint of the present step. Collective.

    It is in place when this returns; with `checkpoint.asynchronous` when `finish_save` has, which
    the next save, the stop and the export call first.
    """
    started = time.monotonic()
    finish_save(training)
    was_asked = training.run.save_file.exists()
    training.coordinator.record_save()
    progress = training.coordinator.progress
    state = {field.name: getattr(progress, field.name) for field in fields(progress)}
    extra: dict[str, torch.Tensor] = {}
    if training.policy is not None:
        state["policy"] = training.policy.to_json()
        extra = training.policy.to_tensors()
    about: dict[str, JSONValue] = {
        "stage": progress.stage,
        "attempt": int(os.environ.get(ATTEMPT_VARIABLE, "1")),
        "digests": cast("dict[str, JSONValue]", _digests(training)),
    }
    training.writer.start(training.engine, progress.step, state, about, extra)
    pause_seconds = time.monotonic() - started
    training.save_under_way = SaveUnderWay(progress.stage, pause_seconds, was_asked)
    if not training.config.checkpoint.asynchronous:
        finish_save(training)
    training.saved_at_seconds = time.monotonic()


def finish_save(training: Training) -> None:
    """Waits until the save under way, if any, is in place. Collective.

    Raises StorageError (74) on all ranks when one could not write.
    """
    committed = training.writer.finish()
    if committed is not None:
        _tell(training, committed)


def _digests(training: Training) -> dict[str, str]:
    """Returns what a checkpoint was made from: the whole record, its config, each input."""
    inputs = training.inputs
    config = {key: value for key, value in inputs.items() if not key.startswith("digest.")}
    parts = {
        key.removeprefix("digest."): str(value)
        for key, value in inputs.items()
        if key.startswith("digest.") and value is not None
    }
    return {"run": training.run_digest, "config": digest_of(config), **parts}


def _tell_committed(training: Training) -> None:
    """Tells of a save as soon as it is in place. Rank 0 only."""
    committed = training.writer.committed
    if committed is not None:
        _tell(training, committed)


def _tell(training: Training, committed: Committed) -> None:
    """Logs a save that is in place, once, and removes old checkpoints. Rank 0 only."""
    about, training.save_under_way = training.save_under_way, None
    if about is None:
        return
    settings, run = training.config.checkpoint, training.run
    pause_seconds = about.pause_seconds if settings.asynchronous else committed.seconds
    training.record(
        {
            "kind": "checkpoint",
            "step": committed.step,
            "stage": about.stage,
            "bytes": committed.num_bytes,
            "seconds": committed.seconds,
            "pause_seconds": pause_seconds,
            "is_asynchronous": settings.asynchronous,
        }
    )
    prune_checkpoints(run.checkpoints, settings.keep_last, _kept_steps(training))
    if about.was_asked:
        run.save_file.unlink(missing_ok=True)
    text = f"{committed.num_bytes / 1e6:.1f} MB in {committed.seconds:.1f} s"
    if settings.asynchronous:
        text += f", {pause_seconds:.1f} s of them training stood still"
    training.display.note(f"step {committed.step}: checkpoint, {text}")
    if not training.has_told_interval:
        training.has_told_interval = True
        training.display.note(interval_hint(pause_seconds, settings.mtbf_hours))


def interval_hint(pause_seconds: float, mtbf_hours: float) -> str:
    """Returns a line with the interval that loses least time to saves and failures together.

    Young (1974), Daly (2006): the root of 2 * cost of a save * mean time between failures.
    """
    seconds = math.sqrt(2.0 * pause_seconds * 3600.0 * mtbf_hours)
    share = pause_seconds / seconds + seconds / (2.0 * 3600.0 * mtbf_hours)
    return (
        f"a checkpoint costs {pause_seconds:.2f} s: with a failure every {mtbf_hours:g} h "
        f"(checkpoint.mtbf_hours), one every {seconds / 60.0:.1f} min loses least, {share:.2%} of "
        "the time (Young/Daly)"
    )


def _kept_steps(training: Training) -> set[int]:
    """Returns the steps that stay besides the newest: a run that falls back needs its best too."""
    config, folder = training.config, training.run.checkpoints
    progress = training.coordinator.progress
    kept = set(progress.stage_ends) if config.checkpoint.keep_stage_ends else set()
    if config.export.select == "best_dev":
        kept.add(progress.best_step)
        for step in committed_steps(folder)[-config.checkpoint.keep_last :]:
            # A damaged one cannot be gone back to; it is named when it is tried.
            with contextlib.suppress(ValueError):
                found = read_checkpoint(step_folder(folder, step), training.run_digest)
                kept.add(cast("int", found.state["best_step"]))
    return kept


def export(training: Training) -> None:
    """Writes the selected weights for `from_pretrained`. Collective (finding the checkpoint)."""
    config, rank, run = training.config, training.rank, training.run
    finish_save(training)
    progress = training.coordinator.progress
    step = progress.best_step if config.export.select == "best_dev" else progress.step
    checkpoint = find_checkpoint(run.checkpoints, rank, training.run_digest, "fail", only_step=step)
    if rank.is_main:
        assert checkpoint is not None, "the last step of a stage is always saved"
        dtype = torch_dtype(config.engine.dtype, rank.device)
        write_export(
            run.export,
            training.student,
            training.tokenizer,
            checkpoint,
            dtype,
            config.models.student.lora,
            model_card(
                config,
                run,
                training.plan.stages,
                training.inputs,
                checkpoint.step,
                training.student.folder,
            ),
            finished_record(config, run),
        )
        say(f"exported step {checkpoint.step} to {run.export}")
    barrier(rank)
