"""Symmetric KL: a weighted sum of both directions."""

from __future__ import annotations

import torch

from pocl_dist.losses.log_space import kl_N


def symmetric_kl(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    reverse_weight: float,
) -> torch.Tensor:
    """Returns w KL(student | teacher) + (1 - w) KL(teacher | student) per token, in nats.

    w = `reverse_weight` in [0, 1]. Source: Jeffreys 1946; the weight as in the code of POCL.
    """
    reverse_N = kl_N(student_logprobs_NV, teacher_logprobs_NV)
    forward_N = kl_N(teacher_logprobs_NV, student_logprobs_NV)
    return reverse_weight * reverse_N + (1 - reverse_weight) * forward_N


def symmetric_kl_gradient(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    reverse_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    The gradient is w s (log s - log t - reverse KL) + (1 - w) (s - t).
    """
    probs_NV, teacher_probs_NV = student_logprobs_NV.exp(), teacher_logprobs_NV.exp()
    gap_NV = student_logprobs_NV - teacher_logprobs_NV
    reverse_N = (probs_NV * gap_NV).sum(dim=-1)
    forward_N = -(teacher_probs_NV * gap_NV).sum(dim=-1)
    reverse_grad_NV = probs_NV * (gap_NV - reverse_N.unsqueeze(-1))
    grad_NV = reverse_weight * reverse_grad_NV + (1 - reverse_weight) * (
        probs_NV - teacher_probs_NV
    )
    return reverse_weight * reverse_N + (1 - reverse_weight) * forward_N, grad_NV
