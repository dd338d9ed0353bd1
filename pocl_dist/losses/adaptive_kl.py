"""Adaptive KL: forward KL where the teacher's likely tokens are off, reverse KL where the rest is.

N valid tokens, V vocabulary, K most likely tokens of the teacher.
"""

from __future__ import annotations

import torch

from pocl_dist.losses.log_space import kl_N

FIRST_K = 64
"""How many of the teacher's tokens are sorted at first; most heads are far smaller."""


def adaptive_kl(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, head_mass: float
) -> torch.Tensor:
    """Returns a KL(teacher | student) + (1 - a) KL(student | teacher) per token, in nats.

    a is the share of sum_v |t - s| that lies in the head: the teacher's most likely tokens while
    their probabilities add up to at most `head_mass` in (0, 1), and always the first. a gets no
    gradient. Where the distributions are equal, a is 1/2.
    Source: Wu et al. 2024, Rethinking KL in KD for LLMs (arXiv 2404.02657), section 4.
    """
    head_weight_N = _head_weight_N(student_logprobs_NV, teacher_logprobs_NV, head_mass)
    forward_N = kl_N(teacher_logprobs_NV, student_logprobs_NV)
    reverse_N = kl_N(student_logprobs_NV, teacher_logprobs_NV)
    return head_weight_N * forward_N + (1 - head_weight_N) * reverse_N


def adaptive_kl_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, head_mass: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    The gradient is a (s - t) + (1 - a) s (log s - log t - reverse KL).
    """
    head_weight_N = _head_weight_N(student_logprobs_NV, teacher_logprobs_NV, head_mass)
    head_weight_N1 = head_weight_N.unsqueeze(-1)
    probs_NV, teacher_probs_NV = student_logprobs_NV.exp(), teacher_logprobs_NV.exp()
    gap_NV = student_logprobs_NV - teacher_logprobs_NV
    reverse_N = (probs_NV * gap_NV).sum(dim=-1)
    forward_N = -(teacher_probs_NV * gap_NV).sum(dim=-1)
    grad_NV = head_weight_N1 * (probs_NV - teacher_probs_NV)
    grad_NV += (1 - head_weight_N1) * probs_NV * (gap_NV - reverse_N.unsqueeze(-1))
    return head_weight_N * forward_N + (1 - head_weight_N) * reverse_N, grad_NV


@torch.no_grad()
def _head_weight_N(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, head_mass: float
) -> torch.Tensor:
    """Returns the head's share of the total difference.

    Only the K most likely tokens are sorted; K grows until no head reaches its end.
    """
    vocabulary_size = teacher_logprobs_NV.shape[-1]
    num_sorted = min(FIRST_K, vocabulary_size)
    while True:
        logprobs_NK, columns_NK = teacher_logprobs_NV.topk(num_sorted, dim=-1)
        probs_NK = logprobs_NK.exp()
        is_head_NK = probs_NK.cumsum(dim=-1) <= head_mass
        is_head_NK[..., 0] = True
        if num_sorted == vocabulary_size or not is_head_NK[..., -1].any():
            break
        num_sorted = min(8 * num_sorted, vocabulary_size)
    gap_NK = (probs_NK - student_logprobs_NV.gather(-1, columns_NK).exp()).abs()
    head_N = (gap_NK * is_head_NK).sum(dim=-1)
    total_N = (student_logprobs_NV.exp() - teacher_logprobs_NV.exp()).abs().sum(dim=-1)
    # Equal up to rounding; the head alone may come out larger than all by a bit.
    return torch.where(total_N > 0, head_N / total_N, 0.5).clamp(max=1)
