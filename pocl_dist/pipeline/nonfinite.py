"""Steps whose loss or gradient is not finite: left out, counted, written down; too many in a row
end the run, or take it back to a checkpoint.

A skipped step changes no weight, no moment and no step count, so the run goes on as if its batch
had never been there. Every rank comes here with the same finding, made from sums over all ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.distributed.collectives import gather_texts
from pocl_dist.errors import DivergedError
from pocl_dist.files import JSONValue, atomic_write_json
from pocl_dist.pipeline.rewind import go_back, step_to_go_back_to
from pocl_dist.pipeline.train_step import NotFinite
from pocl_dist.pipeline.training import Training
from pocl_dist.records import Batch, EncodedExample

MAX_NAMED_IDS = 5


def skip_step(
    training: Training,
    instruction: Instruction,
    examples: Sequence[EncodedExample],
    batches: Sequence[Batch],
    found: NotFinite,
) -> None:
    """Counts the step that was not taken, dumps its batch, and says so. Collective.

    `examples` are those of the global batch, `batches` this rank's. At `nonfinite.max_in_row` in a
    row goes back to a checkpoint if asked to and possible, else raises DivergedError (76) on all
    ranks.
    """
    settings, coordinator = training.config.nonfinite, training.coordinator
    coordinator.record_step(is_skipped=True)
    progress = coordinator.progress
    ids = _suspects(training, batches, found) or list(
        dict.fromkeys(example.example_id for example in examples)
    )
    dump: Path | None = None
    if progress.num_skipped <= settings.max_dumps:
        dump = _write_dump(training, instruction, examples, batches, found)
    where = (
        f"step {instruction.step + 1}, stage {instruction.stage}, "
        f"temperature {instruction.temperature:g}: {found.reason}"
    )
    training.record(
        {
            "kind": "step_skipped",
            "step": instruction.step + 1,
            "stage": instruction.stage,
            "temperature": instruction.temperature,
            "kd_ratio": instruction.kd_ratio,
            "learning_rate": instruction.learning_rate,
            "reason": found.reason,
            "example_ids": ids,
            "num_in_row": progress.num_skipped_in_row,
        }
    )
    training.tell_status()
    if training.rank.is_main:
        training.display.note(f"WARNING: {where}; the step was skipped")
    if progress.num_skipped_in_row < settings.max_in_row:
        return
    target = step_to_go_back_to(training)
    if target is not None:
        go_back(training, target)
        return
    named = ", ".join(ids[:MAX_NAMED_IDS]) + (", ..." if len(ids) > MAX_NAMED_IDS else "")
    raise DivergedError(
        f"{where}; {progress.num_skipped_in_row} in a row (nonfinite.max_in_row), no weight was "
        f"changed by them; examples {named}; "
        + (f"the batch is in {dump}; " if dump else "")
        + _remedy(training)
    )


def _remedy(training: Training) -> str:
    if not training.config.nonfinite.rewind:
        return (
            "the same command with nonfinite.rewind=true goes back to the last checkpoint and "
            "leaves out the steps since then"
        )
    return (
        f"after {training.coordinator.progress.num_rewinds} rewind(s) (nonfinite.max_rewinds) there"
        " is no more going back; lower optimizer.learning_rate in another run_dir"
    )


def _is_finite(sums: Sequence[float]) -> bool:
    return all(map(math.isfinite, sums))


def _suspects(training: Training, batches: Sequence[Batch], found: NotFinite) -> list[str]:
    """Returns the ids of all ranks' micro-batches whose own loss is not finite. Collective."""
    mine = [
        batch.example_ids
        for batch, sums in zip(batches, found.micro_sums, strict=True)
        if not _is_finite(sums)
    ]
    texts = gather_texts(json.dumps(list(chain.from_iterable(mine))), training.rank)
    return list(dict.fromkeys(chain.from_iterable(json.loads(text) for text in texts)))


def _write_dump(
    training: Training,
    instruction: Instruction,
    examples: Sequence[EncodedExample],
    batches: Sequence[Batch],
    found: NotFinite,
) -> Path:
    """Writes what this rank was about to train on; returns the file."""
    step, rank = instruction.step + 1, training.rank
    path = training.run.nonfinite / f"step-{step:06d}-rank-{rank.index:05d}.json"
    value: dict[str, JSONValue] = {
        "step": step,
        "stage": instruction.stage,
        "step_in_stage": instruction.step_in_stage,
        "rank": rank.index,
        "world_size": rank.world_size,
        "reason": found.reason,
        "temperature": instruction.temperature,
        "kd_ratio": instruction.kd_ratio,
        "learning_rate": instruction.learning_rate,
        "micro_batches": [
            _micro_batch(batch, sums, examples)
            for batch, sums in zip(batches, found.micro_sums, strict=True)
        ],
    }
    atomic_write_json(path, value)
    return path


def _micro_batch(
    batch: Batch, sums: Sequence[float], examples: Sequence[EncodedExample]
) -> dict[str, JSONValue]:
    ids = set(batch.example_ids)
    names = ("loss_sum", "kd_loss_sum", "ce_loss_sum", "kl_sum")
    rows: list[JSONValue] = [
        {
            "example_id": example.example_id,
            "num_prompt_tokens": example.num_prompt_tokens,
            "num_tokens": len(example.token_ids),
            "token_ids": list(example.token_ids),
        }
        for example in examples
        if example.example_id in ids
    ]
    return {
        # JSON knows no NaN: such a number is written as text.
        **{n: s if math.isfinite(s) else str(s) for n, s in zip(names, sums, strict=True)},
        "num_label_tokens": batch.num_label_tokens,
        "examples": rows,
    }
