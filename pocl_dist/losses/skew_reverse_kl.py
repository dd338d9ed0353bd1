"""Skew reverse KL: reverse KL against a teacher that is mixed with some of the student."""

from __future__ import annotations

import math

import torch

from pocl_dist.losses.log_space import kl_N, log_mixture_NV
from pocl_dist.losses.reverse_kl import reverse_kl_gradient


def skew_reverse_kl(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, skew: float
) -> torch.Tensor:
    """Returns KL(student | (1 - skew) teacher + skew student) per token, in nats.

    `skew` in [0, 1); 0 is reverse KL. At most -log(skew).
    Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898), section 3.1.
    """
    if skew == 0:
        return kl_N(student_logprobs_NV, teacher_logprobs_NV)
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, skew)
    return kl_N(student_logprobs_NV, mixture_NV)


def skew_reverse_kl_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, skew: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    With g = log(s / m) - skew s / m, of the mixture m, the gradient is s (g - sum_v s g).
    """
    if skew == 0:
        return reverse_kl_gradient(student_logprobs_NV, teacher_logprobs_NV)
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, skew)
    probs_NV = student_logprobs_NV.exp()
    gap_NV = student_logprobs_NV - mixture_NV
    slope_NV = gap_NV - (gap_NV + math.log(skew)).exp()
    mean_N = (probs_NV * slope_NV).sum(dim=-1)
    return (probs_NV * gap_NV).sum(dim=-1), probs_NV * (slope_NV - mean_N.unsqueeze(-1))
