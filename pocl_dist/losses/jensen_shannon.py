"""Generalised Jensen-Shannon divergence: both distributions against their mixture; bounded."""

from __future__ import annotations

import torch

from pocl_dist.losses.log_space import kl_N, log_mixture_NV


def jensen_shannon(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    student_weight: float,
) -> torch.Tensor:
    """Returns w KL(student | m) + (1 - w) KL(teacher | m) per token, in nats.

    m = w student + (1 - w) teacher, w = `student_weight` in (0, 1); at most log 2, at w = 1/2.
    Source: Agarwal et al. 2023, GKD (arXiv 2306.13649), eq. 1, with beta = 1 - w.
    """
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, student_weight)
    student_part_N = kl_N(student_logprobs_NV, mixture_NV)
    teacher_part_N = kl_N(teacher_logprobs_NV, mixture_NV)
    return student_weight * student_part_N + (1 - student_weight) * teacher_part_N


def jensen_shannon_gradient(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    student_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    The gradient is w s (log s - log m - KL(student | m)): the mixture's own derivatives cancel.
    """
    mixture_NV = log_mixture_NV(student_logprobs_NV, teacher_logprobs_NV, student_weight)
    probs_NV = student_logprobs_NV.exp()
    gap_NV = student_logprobs_NV - mixture_NV
    student_part_N = (probs_NV * gap_NV).sum(dim=-1)
    teacher_part_N = kl_N(teacher_logprobs_NV, mixture_NV)
    value_N = student_weight * student_part_N + (1 - student_weight) * teacher_part_N
    return value_N, student_weight * probs_NV * (gap_NV - student_part_N.unsqueeze(-1))
