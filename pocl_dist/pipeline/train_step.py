"""One optimizer step: teacher and student forward, loss, backward, update."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.distributed.collectives import gather_floats
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import DivergedError
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
    was_skipped: bool  # fp16 overflow: the loss scale was lowered instead


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


def _update(engine: DeepSpeedEngine) -> float:
    """Clips, takes the AdamW step and returns the global gradient norm before clipping."""
    own_norm = None
    if (
        not engine.zero_optimization()
    ):  # DeepSpeed does not tell it here; gradients are whole and averaged
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        own_norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    norm = engine.get_global_grad_norm() if own_norm is None else own_norm
    assert norm is not None, "ZeRO computes the norm in every step"
    return float(norm)


def train_step(
    engine: DeepSpeedEngine,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    num_label_tokens: int,
    instruction: Instruction,
    rank: Rank,
) -> StepResult:
    """Takes one optimizer step on this rank's micro-batches and returns global figures. Collective.

    1. every micro-batch: teacher, student, loss sum, backward, normalised by the global token
       count;
    2. sums over the ranks; a loss that is not finite stops the run before the update
       (DivergedError, 76);
    3. clip, AdamW.

    DeepSpeed averages gradients over ranks and adds those of micro-batches; the factor undoes the
    average, so that the gradient is that of sum(loss) / global tokens however the batch is split.
    """
    factor = rank.world_size / num_label_tokens
    sums = torch.zeros(4, dtype=torch.float64, device=rank.device)
    for index, batch in enumerate(batches):
        # The number of micro-batches depends on the lengths: told, not counted.
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss_sum, part_sums = _forward_backward(engine, teacher, batch.to(rank.device), factor)
        sums += torch.cat([loss_sum[None], part_sums])
        if index < len(batches) - 1:
            engine.step()  # counts the micro-batch; the last call updates
    num_real = sum(batch.num_tokens for batch in batches)
    num_padded = sum(batch.input_ids_BT.numel() for batch in batches if batch.num_tokens)
    rows = gather_floats([*sums.tolist(), num_real, num_padded, peak_memory_bytes(rank)], rank)
    totals = [math.fsum(column) for column in zip(*rows, strict=True)]
    loss, kd_loss, ce_loss, kl = (total / num_label_tokens for total in totals[:4])
    if not all(map(math.isfinite, totals[:4])):
        raise DivergedError(
            f"step {instruction.step}, stage {instruction.stage}, "
            f"temperature {instruction.temperature:g}: the loss is not finite "
            f"(kd {kd_loss}, cross-entropy {ce_loss}); the step was not taken"
        )
    skipped_before = engine.skipped_steps
    grad_norm = _update(engine)
    was_skipped = engine.skipped_steps > skipped_before
    if not math.isfinite(grad_norm) and not was_skipped:
        raise DivergedError(
            f"step {instruction.step}, stage {instruction.stage}, "
            f"temperature {instruction.temperature:g}: the gradient norm is not finite; "
            "resume from the last checkpoint with a lower learning rate"
        )
    return StepResult(
        loss=loss,
        kd_loss=kd_loss,
        ce_loss=ce_loss,
        kl=kl,
        grad_norm=grad_norm if math.isfinite(grad_norm) else 0.0,
        num_tokens=num_label_tokens,
        num_input_tokens=int(totals[4]),
        padding_share=1.0 - totals[4] / max(totals[5], 1.0),
        peak_memory_bytes=int(max(row[6] for row in rows)),
        was_skipped=was_skipped,
    )
