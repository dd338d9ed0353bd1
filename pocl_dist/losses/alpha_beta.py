"""Alpha-beta divergence: how much likely tokens and large ratios count are two separate knobs."""

from __future__ import annotations

import torch


def alpha_beta(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    alpha: float,
    beta: float,
) -> torch.Tensor:
    """Returns sum_v (a t^(a+b) + b s^(a+b) - (a+b) t^a s^b) / (a b (a+b)) per token.

    a = `alpha` and b = `beta` in [0, 1]; where one of them is 0, the limit: a = 1, b = 0 is forward
    KL, a = 0, b = 1 reverse KL, a = b = 0 half the squared distance of the log-probabilities and
    a = b = 1 that of the probabilities.
    Source: Wang et al. 2025, ABKD (arXiv 2505.04560); the defaults 0.2 and 0.7 are those of their
    GPT-2 scripts. Their code has 1 / a for the 1 / a^2 of the limit b = 0 (and alike for a = 0),
    which agrees at 1 only.
    """
    log_ratio_NV = teacher_logprobs_NV - student_logprobs_NV
    if alpha == beta == 0:
        return (log_ratio_NV * log_ratio_NV).sum(dim=-1) / 2
    # The same sum from power differences: no term of it is lost to cancellation near 0.
    terms_NV = (alpha * teacher_logprobs_NV).exp() * _power_difference_NV(
        student_logprobs_NV, teacher_logprobs_NV, beta
    ) - (beta * student_logprobs_NV).exp() * _power_difference_NV(
        student_logprobs_NV, teacher_logprobs_NV, alpha
    )
    return terms_NV.sum(dim=-1) / (alpha + beta)


def alpha_beta_gradient(
    student_logprobs_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    *,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence per token and its gradient for the student's logits.

    With g = s^b (s^a - t^a) / a, the derivative for log s, the gradient is g - s sum_v g.
    """
    value_N = alpha_beta(student_logprobs_NV, teacher_logprobs_NV, alpha=alpha, beta=beta)
    slope_NV = -_power_difference_NV(student_logprobs_NV, teacher_logprobs_NV, alpha)
    if beta != 0:
        slope_NV = (beta * student_logprobs_NV).exp() * slope_NV
    slope_N = slope_NV.sum(dim=-1, keepdim=True)
    return value_N, slope_NV - student_logprobs_NV.exp() * slope_N


def _power_difference_NV(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, power: float
) -> torch.Tensor:
    """Returns (t^power - s^power) / power, for power 0 its limit log t - log s.

    Through expm1 of minus the distance, so that it neither overflows nor cancels.
    """
    log_ratio_NV = teacher_logprobs_NV - student_logprobs_NV
    if power == 0:
        return log_ratio_NV
    larger_NV = (power * torch.maximum(student_logprobs_NV, teacher_logprobs_NV)).exp()
    shortfall_NV = -torch.expm1(-power * log_ratio_NV.abs()) / power
    return log_ratio_NV.sign() * larger_NV * shortfall_NV
