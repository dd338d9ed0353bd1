"""Total variation distance: how much probability mass is misplaced; between 0 and 1."""

from __future__ import annotations

import torch


def total_variation(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> torch.Tensor:
    """Returns 1/2 sum_v |s - t| per token.

    Source: Wen et al. 2023, f-DISTILL (arXiv 2307.15190). Its gradient falls with 1/T, not 1/T^2.
    """
    return (student_logprobs_NV.exp() - teacher_logprobs_NV.exp()).abs().sum(dim=-1) / 2


def total_variation_gradient(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    With g = sign(s - t) / 2 the gradient is s (g - sum_v s g).
    """
    probs_NV = student_logprobs_NV.exp()
    gap_NV = probs_NV - teacher_logprobs_NV.exp()
    half_sign_NV = gap_NV.sign() / 2
    mean_N = (probs_NV * half_sign_NV).sum(dim=-1)
    return gap_NV.abs().sum(dim=-1) / 2, probs_NV * (half_sign_NV - mean_N.unsqueeze(-1))
