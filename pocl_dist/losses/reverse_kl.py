"""Reverse KL: the student must avoid all that the teacher finds unlikely."""

from __future__ import annotations

import torch

from pocl_dist.losses.log_space import kl_N


def reverse_kl(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> torch.Tensor:
    """Returns KL(student | teacher) = sum_v s (log s - log t) per token, in nats.

    Source: Gu et al. 2023, MiniLLM (arXiv 2306.08543).
    """
    return kl_N(student_logprobs_NV, teacher_logprobs_NV)


def reverse_kl_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    The gradient is s (log s - log t - divergence).
    """
    probs_NV = student_logprobs_NV.exp()
    gap_NV = student_logprobs_NV - teacher_logprobs_NV
    value_N = (probs_NV * gap_NV).sum(dim=-1)
    return value_N, probs_NV * (gap_NV - value_N.unsqueeze(-1))
