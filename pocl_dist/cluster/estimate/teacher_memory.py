"""What the teacher takes on a rank: its weights, its forward pass, its answer, or its cache."""

from __future__ import annotations

from pocl_dist.cluster.estimate.activations import forward_bytes
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape

PREFETCH = 5 * 10**7
"""Numbers that ZeRO-3 gathers ahead: DeepSpeed 0.19's default."""


def teacher_weights(setup: Setup) -> int:
    """Returns the online teacher's weights: whole on one rank, else a part."""
    if not setup.has_online_teacher:
        return 0
    assert setup.teacher is not None
    return -(-setup.dtype_bytes * setup.teacher.num_parameters // setup.world_size)


def is_partitioned(setup: Setup) -> bool:
    """Returns whether the online teacher runs in a ZeRO-3 engine (teacher/online.py)."""
    return setup.world_size > 1 or setup.config.teacher.offload_param != "none"


def cache_head(setup: Setup) -> int:
    """Returns the teacher's head, which a cache of hidden states needs whole on every rank."""
    if not setup.has_teacher or setup.config.teacher.source != "cache_hidden":
        return 0
    assert setup.teacher is not None
    return setup.dtype_bytes * setup.teacher.head_parameters


def teacher_answer(setup: Setup) -> dict[str, int]:
    """Returns parts with what a teacher's answer takes while the loss is formed."""
    if not setup.has_teacher:
        return {}
    assert setup.teacher is not None
    rows, length = setup.largest
    labels, s = rows * length.num_labels, setup.dtype_bytes
    wide = setup.teacher.head_hidden
    source = setup.config.teacher.source
    if source == "online":
        answer = s * wide * (rows * length.num_tokens + labels)
        head = s * setup.teacher.head_parameters if is_partitioned(setup) else 0
        weights = 0 if _is_offloaded(setup) else teacher_weights(setup)
        return {"teacher": weights + answer + head}
    if source == "cache_hidden":
        return {"cache": cache_head(setup) + s * wide * labels}
    return {"cache": labels * (12 * setup.config.teacher.top_k + 4)}  # ids as 8 bytes


def _is_offloaded(setup: Setup) -> bool:
    return setup.config.teacher.offload_param != "none" and not setup.device.is_cpu


def teacher_working(setup: Setup, shape: ModelShape, num_tokens: int, *, is_shared: bool) -> int:
    """Returns what a teacher's forward pass takes besides its own weights.

    A frozen model uses each weight once: of a partitioned one (`is_shared`) what is at work and
    what is prefetched is whole. Prefetched weights come in one buffer and are copied out of it,
    before the layers' own results exist. The head is not part of the pass.
    """
    working = forward_bytes(shape, num_tokens, setup.dtype_bytes)
    if not is_shared:
        return working
    head = 0 if shape.is_tied else shape.head_parameters
    backbone = shape.num_parameters - head
    whole = min(backbone, max(shape.layer_matrices, shape.head_parameters) + PREFETCH)
    buffer = setup.dtype_bytes * min(shape.num_matrix_parameters, PREFETCH)
    return setup.dtype_bytes * whole + max(working, buffer)
