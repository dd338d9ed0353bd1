"""Distillation losses: one file per divergence; everything around them is in `distillation.py`.

To add a divergence: (1) write `f(student_logprobs_NV, teacher_logprobs_NV, **kwargs) ->
N` in a file of its own here, in log space; (2) add it to DIVERGENCES in `registry.py`;
(3) add its arguments and temperature order to LOSSES in
`pocl_dist/config/loss_names.py`. The tests find it there.
"""

from pocl_dist.losses.distillation import DistillationLoss, distillation_loss
from pocl_dist.losses.registry import DIVERGENCES, Divergence, get_divergence

__all__ = [
    "DIVERGENCES",
    "DistillationLoss",
    "Divergence",
    "distillation_loss",
    "get_divergence",
]
