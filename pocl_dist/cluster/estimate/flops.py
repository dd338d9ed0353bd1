"""Work of a step: floating-point operations of matrix products, bytes of element-wise operators.

A product of a token with P weights is 2 P operations forward and 4 P backward. Causal attention
forms half of the matrix: 2 q per token and earlier token, q heads times their size.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.cluster.estimate.layout import StepLayout
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape

_OPERATORS_PER_LAYER = 45  # of a forward pass of Llama in transformers, counted
_BACKWARD = 2  # as much work again, twice


@dataclass(frozen=True)
class Work:
    """What a rank does in a step, by part; operations and bytes."""

    teacher_flops: float
    teacher_bytes: float
    student_flops: float  # forward, backward, and forward again with checkpointing
    student_bytes: float
    loss_flops: float
    num_logits: float  # student's; the element-wise part of the loss goes by these
    num_operators: float

    @property
    def flops(self) -> float:
        """Returns the operations of all parts."""
        return self.teacher_flops + self.student_flops + self.loss_flops


def forward_flops(shape: ModelShape, num_tokens: float, num_squares: float) -> float:
    """Returns the operations of a forward pass of the backbone; squares: sum of length ** 2."""
    return 2 * shape.num_matrix_parameters * num_tokens + (
        2 * shape.query * shape.num_layers * num_squares
    )


def forward_traffic(shape: ModelShape, num_tokens: float, s: int) -> float:
    """Returns the bytes that element-wise operators of a forward pass read and write.

    A norm in fp32 moves about 7 numbers per number, rotary positions 10, the gate 5.
    """
    norms = shape.family.num_norms * 7 * 4 * shape.hidden
    rotary = 0 if shape.family.num_extra_positions is not None else 10 * s
    attention = rotary * (shape.query + shape.kv) + 4 * s * shape.query
    feed_forward = (5 if shape.family.is_gated else 6) * s * shape.ffn
    residual = 6 * s * shape.hidden
    return num_tokens * shape.num_layers * (norms + attention + feed_forward + residual)


def step_work(setup: Setup, layout: StepLayout) -> Work:
    """Returns the work of a rank in an optimizer step of that layout."""
    shape, s = setup.student, setup.dtype_bytes
    passes = 1 + _BACKWARD + (1 if setup.config.engine.gradient_checkpointing else 0)
    head = 2 * shape.vocabulary * shape.head_hidden * layout.num_labels
    loss_flops = (1 + _BACKWARD) * head
    operators = passes * _OPERATORS_PER_LAYER * shape.num_layers
    teacher_flops = teacher_bytes = 0.0
    if setup.has_teacher and setup.config.teacher.source != "cache_topk":
        assert setup.teacher is not None
        teacher_flops = 2 * setup.teacher.head_parameters * layout.num_labels
        if setup.has_online_teacher:
            teacher_flops += forward_flops(setup.teacher, layout.num_tokens, layout.num_squares)
            teacher_bytes = forward_traffic(setup.teacher, layout.num_tokens, s)
            operators += _OPERATORS_PER_LAYER * setup.teacher.num_layers
    return Work(
        teacher_flops=teacher_flops,
        teacher_bytes=teacher_bytes,
        student_flops=passes * forward_flops(shape, layout.num_tokens, layout.num_squares),
        student_bytes=passes * forward_traffic(shape, layout.num_tokens, s),
        loss_flops=loss_flops,
        num_logits=layout.num_labels * setup.vocabulary * (1.0 if setup.has_teacher else 0.5),
        num_operators=operators * layout.num_micro_batches,
    )
