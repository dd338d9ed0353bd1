"""The distillation loss from hidden states: temperature, scaling, mask and mixing, written once.

N tokens of a micro-batch, H hidden size (teacher and student differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from pocl_dist.config.chunk_size import tokens_per_chunk
from pocl_dist.config.loss_names import temperature_scale
from pocl_dist.errors import ConfigError
from pocl_dist.losses.call import Objective, Tokens
from pocl_dist.losses.checks import check_shapes, check_teacher, real_tokens, valid_rows
from pocl_dist.losses.chunks import sum_over_chunks
from pocl_dist.losses.compiled import BLOCK_COMPILER
from pocl_dist.losses.registry import Divergence, get_divergence
from pocl_dist.records import LMHead, TeacherOutput, TeacherTopK


@dataclass(frozen=True)
class DistillationLoss:
    """Sums over the labelled tokens; the caller divides once, by the global token count.

    `loss_sum` = kd_ratio * kd_loss_sum + (1 - kd_ratio) * ce_loss_sum carries the gradient; the
    other tensors are detached. All are fp32 scalars (fp64 for fp64 hidden states), in nats.
    """

    loss_sum: torch.Tensor
    kd_loss_sum: torch.Tensor  # scale(T) * divergence at T
    ce_loss_sum: torch.Tensor  # at temperature 1
    kl_sum: torch.Tensor  # KL(teacher | student) at temperature 1: comparable over stages, losses
    num_tokens: int


def distillation_loss(
    student_hidden_NH: torch.Tensor,
    student_head: LMHead,
    teacher_hidden_NH: torch.Tensor | None,
    teacher_head: LMHead | None,
    labels_N: torch.Tensor,
    divergence: str | Divergence,
    temperature: float,
    kd_ratio: float,
    *,
    teacher_top_k: TeacherTopK | None = None,
    temperature_scaling: str = "auto",
    chunk_size: int | None = None,
    compile_mode: str = "auto",
) -> DistillationLoss:
    """Returns the sums of `kd_ratio * scale(T) * D_T(teacher, student) + (1 - kd_ratio) * CE`.

    Rows whose label is IGNORE_INDEX do not count; labels are already shifted. With N = 0, or no
    label, the sums are 0 and the gradients zeros, so that an empty micro-batch runs the same
    backward. Gradients reach the student's hidden states, head weight and bias only. Without a
    teacher (plain SFT, kd_ratio 0) kd_loss_sum and kl_sum are 0. `teacher_top_k` stands in for the
    teacher's hidden states and head. Logits exist for `chunk_size` tokens at a time (default:
    `config.chunk_size`) and are not kept for backward. `compile_mode` is `loss.compile`.

    Raises ValueError for values out of range and for shapes or vocabularies that do not agree.
    """
    if isinstance(divergence, str):
        divergence = get_divergence(divergence)
    if not 0 <= kd_ratio <= 1:
        raise ConfigError(f"curriculum.kd_ratio: {kd_ratio!r} must be in [0, 1]")
    scale = temperature_scale(
        temperature,
        temperature_scaling,
        temperature_order=divergence.temperature_order,
        published_order=divergence.published_order,
    )
    teacher = TeacherOutput(teacher_hidden_NH, teacher_head, teacher_top_k)
    tokens = _checked_tokens(student_hidden_NH, student_head, teacher, labels_N, chunk_size)
    is_compiled = BLOCK_COMPILER.is_used(
        compile_mode,
        divergence,
        student_hidden_NH.device,
        num_tokens=len(tokens.valid_rows_M),
        vocabulary_size=tokens.vocabulary_size,
    )
    tokens = replace(tokens, compile_mode=compile_mode, is_compiled=is_compiled)
    if kd_ratio > 0 and not tokens.has_teacher:
        raise ValueError(f"a teacher must be given unless kd_ratio is 0 (it is {kd_ratio})")
    objective = Objective(divergence, temperature, scale, kd_ratio)
    inputs = (student_hidden_NH, student_head.weight_VH, student_head.bias_V)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        apply: Callable[..., tuple[torch.Tensor, ...]] = _GradientInForward.apply
        loss_sum, kd_loss_sum, ce_loss_sum, kl_sum = apply(*inputs, tokens, objective)
    else:
        done = sum_over_chunks(*inputs, tokens, objective, needs_grad=(False, False, False))
        loss_sum, kd_loss_sum, ce_loss_sum, kl_sum = done.loss, done.kd_loss, done.ce_loss, done.kl
    return DistillationLoss(loss_sum, kd_loss_sum, ce_loss_sum, kl_sum, len(tokens.valid_rows_M))


class _GradientInForward(torch.autograd.Function):
    """Computes loss and gradients chunk by chunk in forward; backward only scales them.

    Backward must not touch the weight: under ZeRO-3 it is partitioned again by then. The gradients
    are kept apart from the inputs, so the weight is not saved.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        tokens: Tokens,
        objective: Objective,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        needs_grad = (needs_hidden, needs_weight, needs_bias)
        sums = sum_over_chunks(
            hidden_NH, weight_VH, bias_V, tokens, objective, needs_grad=needs_grad
        )
        ctx.save_for_backward(*sums.grads)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(sums.kd_loss, sums.ce_loss, sums.kl)
        ctx.input_dtypes = (  # type: ignore[attr-defined]
            hidden_NH.dtype,
            weight_VH.dtype,
            None if bias_V is None else bias_V.dtype,
        )
        return sums.loss, sums.kd_loss, sums.ce_loss, sums.kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_loss: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # In place, since the head's gradient is the largest tensor here; unless backward may run
        # again over the same graph (retain_graph, gradcheck).
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        grads = [
            None
            if grad is None
            else (grad.mul_(grad_loss) if is_last else grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)  # type: ignore[attr-defined]
        ]
        return *grads, None, None


def _checked_tokens(
    student_hidden_NH: torch.Tensor,
    student_head: LMHead,
    teacher: TeacherOutput,
    labels_N: torch.Tensor,
    chunk_size: int | None,
) -> Tokens:
    """Returns the tokens and their cut; raises ValueError for what does not fit together."""
    vocabulary_size = real_tokens("student", student_head)
    check_shapes(student_hidden_NH, student_head, labels_N, "student")
    check_teacher(teacher, labels_N, vocabulary_size)
    return Tokens(
        valid_rows(labels_N, vocabulary_size),
        labels_N,
        student_head,
        teacher
        if teacher.hidden_NH is None
        else replace(teacher, hidden_NH=teacher.hidden_NH.detach()),
        vocabulary_size=vocabulary_size,
        chunk_size=tokens_per_chunk(
            chunk_size, vocabulary_size, is_cpu=student_hidden_NH.device.type == "cpu"
        ),
    )
