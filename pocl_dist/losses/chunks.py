"""Loss sums and gradients over chunks of tokens, so that the logits of all tokens never exist.

N tokens, M labelled ones, C of a chunk, H hidden size, V rows of the head, R <= V real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pocl_dist.losses.forward_kl import forward_kl
from pocl_dist.losses.registry import Divergence
from pocl_dist.records import LMHead


@dataclass(frozen=True)
class Objective:
    """What is minimised: `kd_ratio * scale * divergence + (1 - kd_ratio) * cross-entropy`."""

    divergence: Divergence
    temperature: float
    scale: float  # scale(T), see loss_names.temperature_scale
    kd_ratio: float


@dataclass(frozen=True)
class Tokens:
    """The part of a micro-batch that gets no gradient, and how it is cut."""

    valid_rows_M: torch.Tensor
    labels_N: torch.Tensor
    teacher_hidden_NH: torch.Tensor | None
    student_head: LMHead  # for logit_scale and softcap only; its tensors come as Function inputs
    teacher_head: LMHead | None
    vocabulary_size: int
    chunk_size: int


@dataclass(frozen=True)
class ChunkedSums:
    """Scalar sums over the labelled tokens; gradients of `loss` for hidden, weight and bias.

    A gradient that nobody needs is None. Hidden has its own dtype, weight and bias fp32 (fp64).
    """

    loss: torch.Tensor
    kd_loss: torch.Tensor
    ce_loss: torch.Tensor
    kl: torch.Tensor
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def sum_over_chunks(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    tokens: Tokens,
    objective: Objective,
    *,
    needs_grad: tuple[bool, bool, bool],
) -> ChunkedSums:
    """Returns sums and gradients; per chunk: logits, loss with d loss / d logits, two products.

    Products are in the dtype of the hidden states, all else in fp32 (fp64 for fp64 hidden states).
    """
    # The first R rows are a view, so nothing is copied when the dtypes agree.
    real_weight_RH = weight_VH.detach()[: tokens.vocabulary_size].to(hidden_NH.dtype)
    wide = _wide_dtype(hidden_NH)
    grad_hidden_NH = torch.zeros_like(hidden_NH) if needs_grad[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if needs_grad[1] else None
    grad_bias_V = (
        torch.zeros_like(bias_V, dtype=wide) if needs_grad[2] and bias_V is not None else None
    )
    sums = _ScalarSums(*(hidden_NH.new_zeros((), dtype=wide) for _ in range(4)))
    # Autocast would choose another dtype for the products than the gradients have.
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        for rows_C in _chunks(tokens):
            hidden_CH = hidden_NH.detach().index_select(0, rows_C)
            scores_CR = _scores_CR(hidden_CH, real_weight_RH, bias_V)
            teacher_logits_CR = _teacher_logits_CR(tokens, rows_C)
            grad_scores_CR = _add_chunk(
                sums,
                scores_CR,
                tokens.student_head,
                teacher_logits_CR,
                tokens.labels_N.index_select(0, rows_C),
                objective,
                needs_grad=any(needs_grad),
            )
            if grad_scores_CR is None:
                continue
            if grad_bias_V is not None:
                grad_bias_V[: tokens.vocabulary_size] += grad_scores_CR.sum(dim=0)
            grad_scores_CR = grad_scores_CR.to(hidden_NH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH.index_copy_(0, rows_C, grad_scores_CR @ real_weight_RH)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[: tokens.vocabulary_size], grad_scores_CR.T, hidden_CH)
    grads = (grad_hidden_NH, grad_weight_VH, grad_bias_V)
    return ChunkedSums(sums.loss, sums.kd_loss, sums.ce_loss, sums.kl, grads)


@dataclass(frozen=True)
class _ScalarSums:
    """Running sums on the device, added to in place so that no chunk waits for the host."""

    loss: torch.Tensor
    kd_loss: torch.Tensor
    ce_loss: torch.Tensor
    kl: torch.Tensor


def _add_chunk(
    sums: _ScalarSums,
    scores_CR: torch.Tensor,
    head: LMHead,
    teacher_logits_CR: torch.Tensor | None,
    labels_C: torch.Tensor,
    objective: Objective,
    *,
    needs_grad: bool,
) -> torch.Tensor | None:
    """Adds one chunk to `sums`; returns d loss / d scores, or None when it is not needed.

    Autograd of the element-wise part serves every divergence. One that knows its own gradient with
    respect to the logits would supply it here, in place of `autograd.grad`.
    """
    kd_ratio, temperature = objective.kd_ratio, objective.temperature
    scores_CR.requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad):
        logits_CR = _logits_CR(scores_CR, head)
        logprobs_CR = logits_CR.log_softmax(dim=-1)
        # A part with weight 0 is reported but costs no backward pass.
        with torch.set_grad_enabled(needs_grad and kd_ratio < 1):
            ce_loss = -logprobs_CR.gather(1, labels_C.unsqueeze(1)).sum()
        loss = (1 - kd_ratio) * ce_loss
        if teacher_logits_CR is not None:
            teacher_logprobs_CR = teacher_logits_CR.log_softmax(dim=-1)
            sums.kl.add_(forward_kl(logprobs_CR.detach(), teacher_logprobs_CR).sum())
            with torch.set_grad_enabled(needs_grad and kd_ratio > 0):
                if temperature != 1:
                    logprobs_CR = (logits_CR / temperature).log_softmax(dim=-1)
                    teacher_logprobs_CR = (teacher_logits_CR / temperature).log_softmax(dim=-1)
                # Logits are finite and phantom columns cut off: no log-probability is -inf.
                divergence_C = objective.divergence.of_finite(logprobs_CR, teacher_logprobs_CR)
                kd_loss = objective.scale * divergence_C.sum()
            loss = loss + kd_ratio * kd_loss
            sums.kd_loss.add_(kd_loss.detach())
    sums.ce_loss.add_(ce_loss.detach())
    sums.loss.add_(loss.detach())
    return torch.autograd.grad(loss, scores_CR)[0] if needs_grad else None


def _teacher_logits_CR(tokens: Tokens, rows_C: torch.Tensor) -> torch.Tensor | None:
    """Returns the teacher's logits of the chunk, or None without a teacher."""
    if tokens.teacher_hidden_NH is None or tokens.teacher_head is None:
        return None
    head = tokens.teacher_head
    hidden_CH = tokens.teacher_hidden_NH.index_select(0, rows_C)
    weight_RH = head.weight_VH.detach()[: tokens.vocabulary_size].to(hidden_CH.dtype)
    return _logits_CR(_scores_CR(hidden_CH, weight_RH, head.bias_V), head)


def _scores_CR(
    hidden_CH: torch.Tensor, weight_RH: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """Returns hidden @ weight.T + bias, the product in the dtype of hidden and the rest wider."""
    scores_CR = (hidden_CH @ weight_RH.T).to(_wide_dtype(hidden_CH))
    if bias_V is not None:
        scores_CR += bias_V.detach()[: weight_RH.shape[0]]
    return scores_CR


def _logits_CR(scores_CR: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Returns softcap(logit_scale * scores)."""
    logits_CR = scores_CR if head.logit_scale == 1 else scores_CR * head.logit_scale
    if head.softcap is not None:
        logits_CR = head.softcap * torch.tanh(logits_CR / head.softcap)
    return logits_CR


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left @ right to `total` in place; without a temporary when the dtypes agree."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _chunks(tokens: Tokens) -> Iterator[torch.Tensor]:
    """Yields the row numbers of each chunk of labelled tokens; nothing when there are none."""
    if len(tokens.valid_rows_M):
        yield from torch.split(tokens.valid_rows_M, tokens.chunk_size)


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
