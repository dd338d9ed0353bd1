"""Loss sums and gradients over chunks of tokens, so that the logits of all tokens never exist.

N tokens, M labelled ones, C of a chunk, H hidden size, V rows of the head, R <= V real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pocl_dist.losses.blocks import Blocks, ScalarSums
from pocl_dist.losses.call import Objective, Tokens
from pocl_dist.losses.head_logits import head_logits_CR, top_k_logits_CR, wide_dtype


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
    wide = wide_dtype(hidden_NH)
    grad_hidden_NH = torch.zeros_like(hidden_NH) if needs_grad[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if needs_grad[1] else None
    grad_bias_V = (
        torch.zeros_like(bias_V, dtype=wide) if needs_grad[2] and bias_V is not None else None
    )
    sums = ScalarSums(*(hidden_NH.new_zeros((), dtype=wide) for _ in range(4)))
    # Autocast would choose another dtype for the products than the gradients have.
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        blocks = Blocks(tokens, objective, sums, needs_grad=any(needs_grad))
        buffer_CR = _buffer_CR(tokens, hidden_NH)
        teacher_buffer_CR = _buffer_CR(tokens, hidden_NH) if tokens.has_teacher else None
        for rows_C in _chunks(tokens):
            hidden_CH = hidden_NH.detach().index_select(0, rows_C)
            logits_CR = head_logits_CR(
                hidden_CH, real_weight_RH, tokens.student_head, buffer_CR[: len(rows_C)]
            )
            teacher_logits_CR = _teacher_logits_CR(tokens, rows_C, teacher_buffer_CR)
            grad_scores_CR = blocks.add(rows_C, logits_CR, teacher_logits_CR)
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


def _teacher_logits_CR(
    tokens: Tokens, rows_C: torch.Tensor, buffer_CR: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns the teacher's logits of the chunk, or None without a teacher."""
    if buffer_CR is None:
        return None
    buffer_CR = buffer_CR[: len(rows_C)]
    teacher = tokens.teacher
    if teacher.top_k is not None:
        return top_k_logits_CR(teacher.top_k, rows_C, buffer_CR)
    head = teacher.head
    assert teacher.hidden_NH is not None and head is not None
    hidden_CH = teacher.hidden_NH.index_select(0, rows_C)
    weight_RH = head.weight_VH.detach()[: tokens.vocabulary_size].to(hidden_CH.dtype)
    return head_logits_CR(hidden_CH, weight_RH, head, buffer_CR)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left @ right to `total` in place; without a temporary when the dtypes agree."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _buffer_CR(tokens: Tokens, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Returns memory for the logits of the largest chunk."""
    num_rows = min(tokens.chunk_size, len(tokens.valid_rows_M))
    return hidden_NH.new_empty(num_rows, tokens.vocabulary_size, dtype=wide_dtype(hidden_NH))


def _chunks(tokens: Tokens) -> Iterator[torch.Tensor]:
    """Yields the row numbers of each chunk of labelled tokens; nothing when there are none.

    Chunks are equal but for one row: a short last one would cost a pass over the head as well.
    """
    num_rows = len(tokens.valid_rows_M)
    if num_rows:
        yield from tokens.valid_rows_M.tensor_split(-(-num_rows // tokens.chunk_size))
