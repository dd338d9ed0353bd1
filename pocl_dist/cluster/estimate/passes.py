"""Seconds and GPU-hours of the passes before training: measure, and the teacher's cache."""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.cluster.estimate.communication import all_gather_seconds
from pocl_dist.cluster.estimate.flops import forward_flops, forward_traffic
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape

_DECODE_OPERATORS = 30  # of a layer, for one token of all rows
_FORWARD_OPERATORS = 45


@dataclass(frozen=True)
class PassTime:
    """A pass over the rows: wall-clock on all devices, and device-hours."""

    name: str
    seconds: float
    device_hours: float
    flops: float


def _rate(setup: Setup) -> float:
    return setup.device.flops[setup.dtype] * setup.device.product_efficiency


def _forward_seconds(setup: Setup, shape: ModelShape, tokens: float, squares: float) -> float:
    device = setup.device
    work = forward_flops(shape, tokens, squares) / _rate(setup)
    work += forward_traffic(shape, tokens, setup.dtype_bytes) / device.bytes_per_second
    starting = _FORWARD_OPERATORS * shape.num_layers * device.op_seconds
    return max(work, starting) if device.overlaps else work + starting


def _answer_seconds(setup: Setup, num_rows: int) -> float:
    """Returns the time in which one device answers a batch: a token of every row at a time.

    Bound by reading weights and keys, by starting operators, or, with many rows, by products.
    Answers are taken to be as long as `generation.max_new_tokens`, or as the references if shorter.
    """
    shape, device = setup.student, setup.device
    steps = min(setup.config.generation.max_new_tokens, setup.workload.longest.num_labels)
    keys = 2 * shape.kv * shape.num_layers * setup.dtype_bytes
    positions = setup.workload.tokens_per_row - setup.workload.labels_per_row + steps / 2
    weights = setup.dtype_bytes * shape.num_parameters
    reading = (weights + num_rows * positions * keys) / device.bytes_per_second
    products = 2 * num_rows * (shape.num_matrix_parameters + shape.head_parameters) / _rate(setup)
    starting = _DECODE_OPERATORS * shape.num_layers * device.op_seconds
    slowest = max(reading, products)
    each = max(slowest, starting) if device.overlaps else slowest + starting
    return steps * each


def measure_pass(setup: Setup) -> PassTime | None:
    """Returns the difficulty pass; None where no order is needed."""
    config = setup.config
    if config.curriculum.num_stages == 1 or config.curriculum.ordering == "shuffled":
        return None
    work, rows = setup.workload, setup.workload.num_rows
    size = config.generation.batch_size
    tokens, squares = size * work.tokens_per_row, size * work.squares_per_row
    head = 2 * setup.student.head_parameters * size * work.labels_per_row / _rate(setup)
    batch = _forward_seconds(setup, setup.student, tokens, squares) + head
    batch += _answer_seconds(setup, size)
    batches = -(-rows // size)
    flops = rows * (
        forward_flops(setup.student, work.tokens_per_row, work.squares_per_row)
        + 2 * setup.student.head_parameters * 2 * work.labels_per_row
        + 2 * setup.student.num_matrix_parameters * work.labels_per_row
    )
    seconds = batches * batch
    return PassTime("measure", seconds / setup.world_size, seconds / 3600, flops)


def cache_pass(setup: Setup) -> PassTime | None:
    """Returns the pass in which the teacher answers every row once; None without a teacher.

    `cache_engine: ray` runs whole copies, whose layers `devices_per_actor` devices share, one at
    work at a time; `zero3` gathers the teacher's layers for every batch.
    """
    if not setup.has_teacher:
        return None
    assert setup.teacher is not None
    config, work, teacher = setup.config.teacher, setup.workload, setup.teacher
    size, rows = config.cache_batch_size, setup.workload.num_rows
    batch = _forward_seconds(
        setup, teacher, size * work.tokens_per_row, size * work.squares_per_row
    )
    flops = forward_flops(teacher, work.tokens_per_row, work.squares_per_row)
    if config.source == "cache_topk":
        flops += 2 * teacher.head_parameters * work.labels_per_row
        # In fp32, and several passes over the logits.
        product = setup.device.flops["fp32"] * setup.device.product_efficiency
        labels = size * work.labels_per_row
        batch += labels * 2 * teacher.head_parameters / product
        batch += labels * teacher.vocabulary * 2 * setup.device.logit_seconds
    batches = -(-rows // size)
    if config.cache_engine == "zero3":
        num_bytes = setup.dtype_bytes * teacher.num_parameters
        gather = all_gather_seconds(num_bytes, setup.cluster, teacher.num_layers)
        batch = max(batch, gather) if setup.device.overlaps else batch + gather
        devices = 1
    else:
        devices = min(config.devices_per_actor, setup.world_size)
    seconds = batches * batch
    actors = max(1, setup.world_size // devices)
    return PassTime("cache", seconds / actors, seconds * devices / 3600, float(rows * flops))
