"""What one call of the loss is about: the objective, the tokens, and how they are computed.

N tokens, M labelled ones, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pocl_dist.losses.elementwise import BlockKind, Factors
from pocl_dist.losses.registry import Divergence
from pocl_dist.records import LMHead, TeacherOutput


@dataclass(frozen=True)
class Objective:
    """What is minimised: `kd_ratio * scale * divergence + (1 - kd_ratio) * cross-entropy`."""

    divergence: Divergence
    temperature: float
    scale: float  # scale(T), see loss_names.temperature_scale
    kd_ratio: float

    def kind(self, *, needs_grad: bool) -> BlockKind:
        """Returns what has to be computed: a part with weight 0 is reported without gradient."""
        return BlockKind(
            self.divergence,
            is_at_temperature_one=self.temperature == 1,
            has_kd_gradient=needs_grad and self.kd_ratio > 0,
            has_ce_gradient=needs_grad and self.kd_ratio < 1,
        )

    def factors(self) -> Factors:
        """Returns the numbers that the gradient takes."""
        inverse = 1 / self.temperature
        return Factors(inverse, self.kd_ratio * self.scale * inverse, 1 - self.kd_ratio)


@dataclass(frozen=True)
class Tokens:
    """The part of a micro-batch that gets no gradient, how it is cut, and how it is computed."""

    valid_rows_M: torch.Tensor
    labels_N: torch.Tensor
    student_head: LMHead  # its weight and bias come as Function inputs
    teacher: TeacherOutput
    vocabulary_size: int
    chunk_size: int
    compile_mode: str = "never"
    is_compiled: bool = False

    @property
    def has_teacher(self) -> bool:
        """Returns whether there is a teacher, of either form."""
        return self.teacher.head is not None or self.teacher.top_k is not None
