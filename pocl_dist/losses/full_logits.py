"""The distillation loss from logits that a model gave itself: for heads that are no linear map.

N tokens of a micro-batch, V real tokens of the vocabulary. All logits, and their gradients, exist
at once here: what `distillation_loss` avoids. The formula is the same, chunk by chunk.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from pocl_dist.config.loss_names import temperature_scale
from pocl_dist.losses.blocks import Blocks, ScalarSums
from pocl_dist.losses.call import Objective, Tokens
from pocl_dist.losses.checks import valid_rows
from pocl_dist.losses.distillation import DistillationLoss
from pocl_dist.losses.head_logits import wide_dtype
from pocl_dist.losses.registry import Divergence, get_divergence
from pocl_dist.records import LMHead, TeacherOutput

TOKENS_PER_CHUNK = 64
_LOWEST_LOGIT = (
    -1e30
)  # of a token that a model rules out by -inf: its probability is 0 all the same


def full_logits_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor,
    divergence: str | Divergence,
    temperature: float,
    kd_ratio: float,
    *,
    temperature_scaling: str = "auto",
    chunk_size: int | None = None,
) -> DistillationLoss:
    """Returns the sums of `distillation_loss`, from logits; gradients reach those of the student.

    Raises ValueError when the shapes do not agree or a teacher is missing.
    """
    if isinstance(divergence, str):
        divergence = get_divergence(divergence)
    teacher_shape = None if teacher_logits_NV is None else teacher_logits_NV.shape
    if teacher_shape not in (None, student_logits_NV.shape):
        raise ValueError(f"logits {student_logits_NV.shape} and teacher's {teacher_shape} differ")
    if labels_N.shape != student_logits_NV.shape[:1]:
        raise ValueError(f"logits {student_logits_NV.shape} and labels {labels_N.shape} differ")
    if kd_ratio > 0 and teacher_logits_NV is None:
        raise ValueError(f"a teacher must be given unless kd_ratio is 0 (it is {kd_ratio})")
    scale = temperature_scale(
        temperature,
        temperature_scaling,
        temperature_order=divergence.temperature_order,
        published_order=divergence.published_order,
    )
    vocabulary_size = student_logits_NV.shape[1]
    tokens = Tokens(
        valid_rows_M=valid_rows(labels_N, vocabulary_size),
        labels_N=labels_N,
        student_head=LMHead(student_logits_NV.new_empty(0)),  # logits need no head
        teacher=TeacherOutput(logits_NV=teacher_logits_NV),
        vocabulary_size=vocabulary_size,
        chunk_size=chunk_size or TOKENS_PER_CHUNK,
    )
    objective = Objective(divergence, temperature, scale, kd_ratio)
    sums = _GradientInForward.apply(student_logits_NV, tokens, objective)
    loss_sum, kd_loss_sum, ce_loss_sum, kl_sum = sums
    return DistillationLoss(loss_sum, kd_loss_sum, ce_loss_sum, kl_sum, len(tokens.valid_rows_M))


class _GradientInForward(torch.autograd.Function):
    """Computes loss and gradient chunk by chunk in forward; backward only scales it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_NV: torch.Tensor, tokens: Tokens, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_grad = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        wide = wide_dtype(logits_NV)
        sums = ScalarSums(*(logits_NV.new_zeros((), dtype=wide) for _ in range(4)))
        blocks = Blocks(tokens, objective, sums, needs_grad=needs_grad)
        grad_NV = torch.zeros_like(logits_NV) if needs_grad else None
        teacher_NV = tokens.teacher.logits_NV
        for rows_C in tokens.valid_rows_M.split(tokens.chunk_size):
            if not len(rows_C):
                continue  # an empty tensor splits into one empty part
            grad_CV = blocks.add(
                rows_C,
                _chunk_CV(logits_NV, rows_C, wide),
                None if teacher_NV is None else _chunk_CV(teacher_NV, rows_C, wide),
            )
            if grad_NV is not None and grad_CV is not None:
                grad_NV.index_copy_(0, rows_C, grad_CV.to(grad_NV.dtype))
        ctx.save_for_backward(grad_NV)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(sums.kd_loss, sums.ce_loss, sums.kl)
        return sums.loss, sums.kd_loss, sums.ce_loss, sums.kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_loss: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad_NV * grad_loss).to(grad_NV.dtype), None, None


def _chunk_CV(logits_NV: torch.Tensor, rows_C: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Returns a copy of the rows that may be overwritten, wide and finite."""
    return logits_NV.detach().index_select(0, rows_C).to(wide).clamp_(min=_LOWEST_LOGIT)
