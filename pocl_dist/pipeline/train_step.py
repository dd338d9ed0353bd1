"""One optimizer step: teacher and student forward, loss, backward, update."""

from __future__ import annotations

import functools
import math
import resource
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.distributed.collectives import gather_floats
from pocl_dist.distributed.gradients import drop_gradients, update
from pocl_dist.distributed.process_group import Rank
from pocl_dist.pipeline.student import batch_arguments
from pocl_dist.records import Batch, TeacherOutput
from pocl_dist.teacher.base import Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StepResult:
    """Means over the label tokens of the global batch, and what the step cost."""

    loss: float
    kd_loss: float
    ce_loss: float
    kl: float
    grad_norm: float
    num_tokens: int  # label tokens, all ranks
    num_input_tokens: int  # tokens without padding, all ranks
    padding_share: float
    peak_memory_bytes: int  # of the rank with most
    is_overflow: bool  # of fp16: the loss scale was lowered, no update was made


@dataclass(frozen=True)
class NotFinite:
    """A step that was not taken: nothing but the random numbers drawn tells that it was tried."""

    reason: str  # the same on every rank
    micro_sums: list[list[float]]  # of this rank, by micro-batch: loss, kd, ce, kl


def peak_memory_bytes(rank: Rank) -> int:
    """Returns the peak of this rank: allocated on the GPU, or resident on a CPU."""
    if rank.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(rank.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forward_backward(
    engine: DeepSpeedEngine, teacher: Teacher | None, batch: Batch, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one micro-batch; returns its (loss sum, [kd, ce, kl] sums), detached. Collective."""
    with nullcontext(TeacherOutput()) if teacher is None else teacher.answer(batch) as output:
        loss_sum, part_sums = engine(*batch_arguments(batch), output, batch.position_ids_BT)
    engine.backward(loss_sum * factor, scale_wrt_gas=False)
    return loss_sum.detach().double(), part_sums


def _total(column: Sequence[float]) -> float:
    """Returns the exact sum; fsum raises where infinities of both signs meet."""
    return math.fsum(column) if all(map(math.isfinite, column)) else sum(column)


def train_step(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    num_label_tokens: int,
    instruction: Instruction,
    rank: Rank,
) -> StepResult | NotFinite:
    """Takes one optimizer step on this rank's micro-batches and returns global figures. Collective.

    1. every micro-batch: teacher, student, loss sum, backward, normalised by the global token
       count;
    2. sums over the ranks; when one is not finite, all ranks drop the gradients and return;
    3. clip, AdamW; neither when the gradient norm over all ranks is not finite.

    DeepSpeed averages gradients over ranks and adds those of micro-batches; the factor undoes the
    average, so that the gradient is that of sum(loss) / global tokens however the batch is split.
    """
    factor = rank.world_size / num_label_tokens
    micro_sums = []
    for index, batch in enumerate(batches):
        # The number of micro-batches depends on the lengths: told, not counted.
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss_sum, part_sums = _forward_backward(engine, teacher, batch.to(rank.device), factor)
        micro_sums.append(torch.cat([loss_sum[None], part_sums]))
        if index < len(batches) - 1:
            engine.step()  # counts the micro-batch; the last call updates
    num_real = sum(batch.num_tokens for batch in batches)
    num_padded = sum(batch.input_ids_BT.numel() for batch in batches if batch.num_tokens)
    sums = functools.reduce(torch.add, micro_sums).tolist()
    rows = gather_floats([*sums, num_real, num_padded, peak_memory_bytes(rank)], rank)
    totals = [_total(column) for column in zip(*rows, strict=True)]
    loss, kd_loss, ce_loss, kl = (total / num_label_tokens for total in totals[:4])
    if not all(map(math.isfinite, totals[:4])):
        drop_gradients(engine)
        strays = [i for i, row in enumerate(rows) if not all(map(math.isfinite, row[:4]))]
        named = ", ".join(map(str, strays))
        reason = f"the loss is not finite (kd {kd_loss}, cross-entropy {ce_loss}; rank(s) {named})"
        return NotFinite(reason, torch.stack(micro_sums).tolist())
    grad_norm = update(engine, rank)
    is_overflow = not math.isfinite(grad_norm)
    if is_overflow and not engine.fp16_enabled():
        return NotFinite("the gradient norm is not finite", torch.stack(micro_sums).tolist())
    return StepResult(
        loss=loss,
        kd_loss=kd_loss,
        ce_loss=ce_loss,
        kl=kl,
        grad_norm=0.0 if is_overflow else grad_norm,
        num_tokens=num_label_tokens,
        num_input_tokens=int(totals[4]),
        padding_share=1.0 - totals[4] / max(totals[5], 1.0),
        peak_memory_bytes=int(max(row[6] for row in rows)),
        is_overflow=is_overflow,
    )
