"""The k likeliest tokens and an even tail, and how far that is from the teacher's distribution.

C positions of a chunk, N positions, K kept tokens, R real tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pocl_dist.models.heads import head_logits
from pocl_dist.records import LMHead, TeacherTopK

LOGITS_BYTES_PER_CHUNK = 64 * 2**20
"""fp32 logits of a chunk; about five tensors of this size live at once."""


def top_k_of(logits_CR: torch.Tensor, k: int) -> TeacherTopK:
    """Returns the k likeliest tokens with log-probabilities at T = 1, and the tail's.

    The tail is summed, not one minus the rest, which would round to 0. With k = R it is -inf.
    """
    logprobs_CR = logits_CR.log_softmax(dim=-1)
    logprobs_CK, token_ids_CK = logprobs_CR.topk(k, dim=-1)
    rest_CR = logprobs_CR.scatter(1, token_ids_CK, -math.inf)
    return TeacherTopK(token_ids_CK, logprobs_CK, rest_CR.logsumexp(dim=-1))


def spread_logprobs(top_k: TeacherTopK, num_real_tokens: int, temperature: float) -> torch.Tensor:
    """Returns log-probabilities (C, R) at `temperature`: the tail evenly over the other tokens."""
    num_others = num_real_tokens - top_k.token_ids_NK.shape[1]
    scores_CK = top_k.logprobs_NK / temperature
    # One of the other tokens; without any, its value counts for nothing.
    other_C = (top_k.log_tail_N - math.log(max(num_others, 1))) / temperature
    tail_C = other_C + math.log(num_others) if num_others else torch.full_like(other_C, -math.inf)
    log_sum_C = torch.cat([scores_CK, tail_C[:, None]], dim=1).logsumexp(dim=1)
    spread_CR = (other_C - log_sum_C)[:, None].expand(-1, num_real_tokens)
    return spread_CR.scatter(1, top_k.token_ids_NK.long(), scores_CK - log_sum_C[:, None])


def truncation_error_sum(logits_CR: torch.Tensor, top_k: TeacherTopK, temperature: float) -> float:
    """Returns the total variation between softmax(logits / T) and what top-k gives, summed over C.

    Total variation, 0..1, is the largest error in the probability of any set of tokens.
    """
    true_CR = (logits_CR / temperature).softmax(dim=-1)
    spread_CR = spread_logprobs(top_k, logits_CR.shape[1], temperature).exp()
    return float((true_CR - spread_CR).abs().sum(dtype=torch.float64)) / 2


def cut_to_top_k(
    hidden_NH: torch.Tensor,
    head: LMHead,
    k: int,
    temperatures: Sequence[float],
    error_sums: dict[str, float],
) -> TeacherTopK:
    """Returns top-k of all positions, and adds each temperature's error to `error_sums`."""
    num_real = head.num_real_tokens or head.weight_VH.shape[0]
    chunk_size = max(1, LOGITS_BYTES_PER_CHUNK // (4 * num_real))
    parts = []
    # One empty chunk when there is no position: the result has its shapes all the same.
    for hidden_CH in hidden_NH.split(chunk_size):
        logits_CR = head_logits(hidden_CH, head)
        parts.append(top_k_of(logits_CR, k))
        for temperature in temperatures:
            key = str(temperature)
            error_sum = truncation_error_sum(logits_CR, parts[-1], temperature)
            error_sums[key] = error_sums.get(key, 0.0) + error_sum
    return TeacherTopK(
        torch.cat([part.token_ids_NK for part in parts]),
        torch.cat([part.logprobs_NK for part in parts]),
        torch.cat([part.log_tail_N for part in parts]),
    )
