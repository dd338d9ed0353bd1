"""Logits of a chunk: from hidden states and a head, or from a teacher's top-k; and their slope.

C tokens of a chunk, H hidden size, R real tokens, K kept per position. Everything but the product
is in fp32 (fp64 for fp64 hidden states).
"""

from __future__ import annotations

import math

import torch

from pocl_dist.records import LMHead, TeacherTopK


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def head_logits_CR(
    hidden_CH: torch.Tensor, weight_RH: torch.Tensor, head: LMHead, buffer_CR: torch.Tensor
) -> torch.Tensor:
    """Fills the buffer with softcap(logit_scale * (hidden @ weight.T + bias)) and returns it.

    One buffer for all chunks: memory that is fetched anew costs a page fault per 4 KiB.
    """
    if hidden_CH.dtype == buffer_CR.dtype:
        torch.mm(hidden_CH, weight_RH.T, out=buffer_CR)
    else:
        buffer_CR.copy_(hidden_CH @ weight_RH.T)
    if head.bias_V is not None:
        buffer_CR += head.bias_V.detach()[: weight_RH.shape[0]]
    if head.logit_scale != 1:
        buffer_CR *= head.logit_scale
    if head.softcap is not None:
        buffer_CR.div_(head.softcap).tanh_().mul_(head.softcap)
    return buffer_CR


def through_head(grad_BR: torch.Tensor, logits_BR: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Turns d loss / d logits, in place, into d loss / d (hidden @ weight.T + bias)."""
    if head.softcap is not None:
        grad_BR *= 1 - (logits_BR / head.softcap).square_()
    if head.logit_scale != 1:
        grad_BR *= head.logit_scale
    return grad_BR


def top_k_logits_CR(
    top_k: TeacherTopK, rows_C: torch.Tensor, buffer_CR: torch.Tensor
) -> torch.Tensor:
    """Fills the buffer with log-probabilities at T = 1 (so: logits of any T) and returns it.

    The tail is spread evenly over the R - K other tokens; with K = R nothing is left of it. A tail
    that is nothing counts as the smallest normal number, so that reverse KL stays finite.
    """
    token_ids_CK = top_k.token_ids_NK.index_select(0, rows_C).long()
    logprobs_CK = top_k.logprobs_NK.index_select(0, rows_C).to(buffer_CR.dtype)
    lowest = math.log(torch.finfo(buffer_CR.dtype).tiny)
    num_others = buffer_CR.shape[1] - token_ids_CK.shape[1]
    if num_others > 0:
        log_tail_C = top_k.log_tail_N.index_select(0, rows_C).to(buffer_CR.dtype)
        buffer_CR.copy_((log_tail_C - math.log(num_others)).clamp(min=lowest).unsqueeze(1))
    return buffer_CR.scatter_(1, token_ids_CK, logprobs_CK.clamp(min=lowest))
