"""The one dictionary of divergences, and what makes a checked callable of a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pocl_dist.config.loss_names import LOSSES, complete_kwargs
from pocl_dist.losses.forward_kl import forward_kl
from pocl_dist.losses.jensen_shannon import jensen_shannon
from pocl_dist.losses.reverse_kl import reverse_kl
from pocl_dist.losses.skew_forward_kl import skew_forward_kl
from pocl_dist.losses.skew_reverse_kl import skew_reverse_kl
from pocl_dist.losses.symmetric_kl import symmetric_kl
from pocl_dist.losses.total_variation import total_variation

DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "symmetric_kl": symmetric_kl,
}


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
    )
