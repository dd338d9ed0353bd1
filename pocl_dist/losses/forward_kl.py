"""Forward KL: the student must cover all that the teacher finds likely."""

from __future__ import annotations

import torch

from pocl_dist.losses.log_space import kl_N


def forward_kl(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> torch.Tensor:
    """Returns KL(teacher | student) = sum_v t (log t - log s) per token, in nats.

    Source: Hinton et al. 2015 (arXiv 1503.02531), with the teacher's entropy: 0 at equality.
    """
    return kl_N(teacher_logprobs_NV, student_logprobs_NV)


def forward_kl_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits: s - t."""
    value_N = kl_N(teacher_logprobs_NV, student_logprobs_NV)
    return value_N, student_logprobs_NV.exp() - teacher_logprobs_NV.exp()
