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
