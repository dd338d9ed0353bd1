"""The element-wise part of the loss: from two blocks of logits to sums and d loss / d logits.

B rows of a block, R real tokens. Products, labels and soft-caps are the caller's. Written for
both: run as it is on blocks that stay in cache, or fused by `torch.compile` (`compiled.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pocl_dist.losses.forward_kl import forward_kl
from pocl_dist.losses.registry import Divergence


class Factors(NamedTuple):
    """The numbers of a stage.

    They are 0-dim tensors for compiled code, so that a stage with other numbers compiles nothing.
    """

    inverse_temperature: float | torch.Tensor
    kd: float | torch.Tensor  # on d divergence / d (logits / T): kd_ratio * scale(T) / T
    ce: float | torch.Tensor  # on d cross-entropy / d logits: 1 - kd_ratio


class BlockTerms(NamedTuple):
    """What a block gives, per row and in nats; None where there is no teacher, or no gradient.

    `grad_logits_BR` lacks the label's own part of the cross-entropy, which is one number per row.
    """

    log_normalizer_B: torch.Tensor  # logsumexp of the logits: cross-entropy = it - logit[label]
    divergence_B: torch.Tensor | None  # at the temperature, without any factor
    kl_B: torch.Tensor | None  # KL(teacher | student) at temperature 1
    grad_logits_BR: torch.Tensor | None


class BlockKind(NamedTuple):
    """What is computed: compiled code is made once for each kind."""

    divergence: Divergence
    is_at_temperature_one: bool
    has_kd_gradient: bool
    has_ce_gradient: bool


def block_terms(
    kind: BlockKind,
    logits_BR: torch.Tensor,
    teacher_logits_BR: torch.Tensor | None,
    factors: Factors,
) -> BlockTerms:
    """Returns the terms of one block; runs under no_grad and changes none of its arguments.

    All logits are finite, so no log-probability is -inf.
    """
    log_normalizer_B = logits_BR.logsumexp(dim=-1)
    logprobs_BR = logits_BR - log_normalizer_B.unsqueeze(-1)
    grad_BR = logprobs_BR.exp() * factors.ce if kind.has_ce_gradient else None
    if teacher_logits_BR is None:
        return BlockTerms(log_normalizer_B, None, None, grad_BR)
    teacher_logprobs_BR = teacher_logits_BR.log_softmax(dim=-1)
    kl_B = forward_kl(logprobs_BR, teacher_logprobs_BR)
    if not kind.is_at_temperature_one:
        logprobs_BR = (logits_BR * factors.inverse_temperature).log_softmax(dim=-1)
        teacher_logprobs_BR = (teacher_logits_BR * factors.inverse_temperature).log_softmax(dim=-1)
    if not kind.has_kd_gradient:
        divergence_B = kind.divergence.of_finite(logprobs_BR, teacher_logprobs_BR)
        return BlockTerms(log_normalizer_B, divergence_B, kl_B, grad_BR)
    divergence_B, kd_grad_BR = kind.divergence.with_gradient(logprobs_BR, teacher_logprobs_BR)
    kd_grad_BR = kd_grad_BR * factors.kd
    grad_BR = kd_grad_BR if grad_BR is None else kd_grad_BR + grad_BR
    return BlockTerms(log_normalizer_B, divergence_B, kl_B, grad_BR)
