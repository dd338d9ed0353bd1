"""Skew forward KL: forward KL against a student that is mixed with some of the teacher."""

from __future__ import annotations

import torch

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
