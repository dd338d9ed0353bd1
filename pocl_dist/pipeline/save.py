"""What the train loop leaves on disk: checkpoints on the way, the export at the end."""

from __future__ import annotations

import time
from dataclasses import fields

import torch

from pocl_dist.distributed.checkpoint import find_checkpoint, prune_checkpoints, save_checkpoint
from pocl_dist.distributed.collectives import barrier
from pocl_dist.distributed.process_group import torch_dtype
from pocl_dist.pipeline.export import write_export
from pocl_dist.pipeline.inputs import finished_record
from pocl_dist.pipeline.run_lock import check_not_fenced
from pocl_dist.pipeline.training import Training


def save(training: Training) -> None:
    """Commits a checkpoint and removes old ones. Collective."""
    started = time.monotonic()
    coordinator, rank, run = training.coordinator, training.rank, training.run
    coordinator.record_save()
    progress = coordinator.progress
    state = {field.name: getattr(progress, field.name) for field in fields(progress)}
    extra: dict[str, torch.Tensor] = {}
    if training.policy is not None:
        state["policy"] = training.policy.to_json()
        extra = training.policy.to_tensors()
    num_bytes = save_checkpoint(
        training.engine,
        run.checkpoints,
        progress.step,
        state,
        rank,
        extra,
        before_commit=lambda: check_not_fenced(run.root),
    )
    training.saved_at_seconds = time.monotonic()
    seconds = time.monotonic() - started
    row = {"step": progress.step, "stage": progress.stage, "bytes": num_bytes, "seconds": seconds}
    training.record({"kind": "checkpoint", **row})
    if rank.is_main:
        kept = set(progress.stage_ends) if training.config.checkpoint.keep_stage_ends else set()
        if training.config.export.select == "best_dev":
            kept.add(progress.best_step)
        prune_checkpoints(run.checkpoints, training.config.checkpoint.keep_last, kept)
        run.save_file.unlink(missing_ok=True)
        training.display.note(
            f"step {progress.step}: checkpoint, {num_bytes / 1e6:.1f} MB in {seconds:.1f} s"
        )


def export(training: Training) -> None:
    """Writes the selected weights for `from_pretrained`. Collective (finding the checkpoint)."""
    config, rank, run = training.config, training.rank, training.run
    progress = training.coordinator.progress
    step = progress.best_step if config.export.select == "best_dev" else progress.step
    checkpoint = find_checkpoint(run.checkpoints, rank, "fail", only_step=step)
    if rank.is_main:
        assert checkpoint is not None, "the last step of a stage is always saved"
        dtype = torch_dtype(config.engine.dtype, rank.device)
        write_export(
            run.export,
            training.student,
            training.tokenizer,
            checkpoint,
            dtype,
            config,
            training.plan.stages,
            finished_record(config, run),
        )
        print(f"exported step {checkpoint.step} to {run.export}", flush=True)
    barrier(rank)
