"""The one dictionary of divergences, and what makes a checked callable of a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pocl_dist.config.loss_names import LOSSES, complete_kwargs
from pocl_dist.losses.adaptive_kl import adaptive_kl, adaptive_kl_gradient
from pocl_dist.losses.alpha_beta import alpha_beta, alpha_beta_gradient
from pocl_dist.losses.forward_kl import forward_kl, forward_kl_gradient
from pocl_dist.losses.jensen_shannon import jensen_shannon, jensen_shannon_gradient
from pocl_dist.losses.reverse_kl import reverse_kl, reverse_kl_gradient
from pocl_dist.losses.skew_forward_kl import skew_forward_kl, skew_forward_kl_gradient
from pocl_dist.losses.skew_reverse_kl import skew_reverse_kl, skew_reverse_kl_gradient
from pocl_dist.losses.symmetric_kl import symmetric_kl, symmetric_kl_gradient
from pocl_dist.losses.total_variation import total_variation, total_variation_gradient

DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "symmetric_kl": symmetric_kl,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
}

GRADIENTS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "forward_kl": forward_kl_gradient,
    "reverse_kl": reverse_kl_gradient,
    "jensen_shannon": jensen_shannon_gradient,
    "total_variation": total_variation_gradient,
    "skew_forward_kl": skew_forward_kl_gradient,
    "skew_reverse_kl": skew_reverse_kl_gradient,
    "symmetric_kl": symmetric_kl_gradient,
    "adaptive_kl": adaptive_kl_gradient,
    "alpha_beta": alpha_beta_gradient,
}
"""Value and gradient at once; a divergence that is not here is differentiated by autograd."""

NOT_COMPILED = frozenset({"adaptive_kl"})
"""Divergences that `torch.compile` cannot take in one piece (a loop that depends on values)."""


@dataclass(frozen=True)
class Divergence:
    """One divergence with its arguments: f(student_logprobs_NV, teacher_logprobs_NV) -> N.

    `function` is the bare formula, for log-probabilities that are finite; calling the object also
    accepts -inf (impossible tokens, phantom columns).
    """

    name: str
    kwargs: Mapping[str, float]
    temperature_order: int
    published_order: int
    function: Callable[..., torch.Tensor]
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(
        self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
    ) -> torch.Tensor:
        """Returns the divergence per token; a column that is -inf on both sides adds nothing.

        -inf becomes the lowest finite number, whose probability is 0 as well: 0 * (-inf + inf)
        would be nan in the value and in the gradient.
        """
        return self.of_finite(
            student_logprobs_NV.clamp(min=torch.finfo(student_logprobs_NV.dtype).min),
            teacher_logprobs_NV.clamp(min=torch.finfo(teacher_logprobs_NV.dtype).min),
        )

    def of_finite(
        self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
    ) -> torch.Tensor:
        """Returns the divergence per token where no log-probability is -inf: two passes fewer."""
        return self.function(student_logprobs_NV, teacher_logprobs_NV, **self.kwargs)

    def with_gradient(
        self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (divergence per token, its gradient for the student's logits), detached.

        For finite log-probabilities. By the divergence's own formula, else by autograd.
        """
        if self.gradient is not None:
            return self.gradient(student_logprobs_NV, teacher_logprobs_NV, **self.kwargs)
        with torch.enable_grad():
            logprobs_NV = student_logprobs_NV.detach().requires_grad_()
            value_N = self.of_finite(logprobs_NV, teacher_logprobs_NV)
            (slope_NV,) = torch.autograd.grad(value_N.sum(), logprobs_NV)
        # The backward pass of log_softmax.
        slope_N = slope_NV.sum(dim=-1, keepdim=True)
        return value_N.detach(), slope_NV - student_logprobs_NV.exp() * slope_N

    @property
    def is_compilable(self) -> bool:
        """Returns whether value and gradient are a formula that `torch.compile` can fuse."""
        return self.gradient is not None and self.name not in NOT_COMPILED


def get_divergence(name: str, **kwargs: float) -> Divergence:
    """Returns the named divergence, defaults filled in.

    Raises ConfigError (a ValueError) that names `loss.name` or `loss.kwargs.<argument>`.
    """
    complete = complete_kwargs(name, kwargs)
    spec = LOSSES[name]
    return Divergence(
        name=name,
        kwargs=complete,
        temperature_order=spec.temperature_order,
        published_order=spec.published_order,
        function=DIVERGENCES[name],
        gradient=GRADIENTS.get(name),
    )
