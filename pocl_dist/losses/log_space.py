"""KL and mixtures of distributions given as log-probabilities; shared by the divergences.

N valid tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch


def kl_N(p_logprobs_NV: torch.Tensor, q_logprobs_NV: torch.Tensor) -> torch.Tensor:
    """Returns KL(p | q) = sum_v p (log p - log q) per token, in nats; exactly 0 where p is q."""
    return (p_logprobs_NV.exp() * (p_logprobs_NV - q_logprobs_NV)).sum(dim=-1)


def log_mixture_NV(
    student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor, student_weight: float
) -> torch.Tensor:
    """Returns log(w student + (1 - w) teacher) for a weight w in (0, 1).

    Never through probabilities: those are 0 in float32 beyond a logit gap of about 100, where
    log(mixture) and its gradient become nan.
    """
    return torch.logaddexp(
        student_logprobs_NV + math.log(student_weight),
        teacher_logprobs_NV + math.log1p(-student_weight),
    )
