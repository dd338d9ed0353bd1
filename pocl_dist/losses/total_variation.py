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
