"""Skew forward KL: forward KL against a student that is mixed with some of the teacher."""

from __future__ import annotations

import math

import torch

from pocl_dist.losses.forward_kl import forward_kl_gradient
from pocl_dist.losses.log_space import kl_N, log_mixture_NV


def skew_forward_kl(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, skew: float
) -> torch.Tensor:
    """Returns KL(teacher | skew teacher + (1 - skew) student) per token, in nats.

    `skew` in [0, 1); 0 is forward KL. At most -log(skew).
    Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898), section 3.1.
    """
    if skew == 0:
        return kl_N(teacher_logprobs_NV, student_logprobs_NV)
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, 1 - skew)
    return kl_N(teacher_logprobs_NV, mixture_NV)


def skew_forward_kl_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, *, skew: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    With r = t (1 - skew) s / m, of the mixture m, the gradient is s sum_v r - r.
    """
    if skew == 0:
        return forward_kl_gradient(student_logprobs_NV, teacher_logprobs_NV)
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, 1 - skew)
    teacher_probs_NV = teacher_logprobs_NV.exp()
    # s / m in log space: at most 1 / (1 - skew), where s and m alone may both be 0.
    share_NV = (student_logprobs_NV + math.log1p(-skew) - mixture_NV).exp() * teacher_probs_NV
    share_N = share_NV.sum(dim=-1, keepdim=True)
    value_N = (teacher_probs_NV * (teacher_logprobs_NV - mixture_NV)).sum(dim=-1)
    return value_N, student_logprobs_NV.exp() * share_N - share_NV
