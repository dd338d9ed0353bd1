"""How a step's rows lie on the ranks: what is computed, padding and waiting included."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pocl_dist.cluster.estimate.workload import RowLength, Workload
from pocl_dist.config import Config
from pocl_dist.data.batching import packed_layout, padded_layout

_NUM_STEPS = 6  # whose layout is looked at


@dataclass(frozen=True)
class StepLayout:
    """One rank's share of an optimizer step; ranks wait for the one with most."""

    num_micro_batches: float
    num_tokens: float  # padding included
    num_squares: float  # sum over rows of the square of the padded length
    num_labels: float


def step_layout(config: Config, workload: Workload, world_size: int) -> StepLayout:
    """Returns the mean of a few steps, rows drawn from the sample and laid out as distill does."""
    engine = config.engine
    return _mean_layout(
        workload,
        world_size,
        engine.global_batch_size,
        engine.micro_batch_size,
        engine.max_waste,
        engine.packing,
    )


@lru_cache(maxsize=256)  # asked for again and again while ways to run are compared
def _mean_layout(
    workload: Workload,
    world_size: int,
    batch_size: int,
    micro_batch_size: int,
    max_waste: float,
    is_packed: bool,
) -> StepLayout:
    draws, layouts = random.Random(0), []
    for _ in range(_NUM_STEPS if workload.is_sampled else 1):
        rows = draws.choices(workload.lengths, k=batch_size)
        lengths = [row.num_tokens for row in rows]
        shares = (
            packed_layout(lengths, world_size, micro_batch_size)
            if is_packed
            else padded_layout(lengths, world_size, micro_batch_size, max_waste)
        )
        layouts.append(_measured(rows, shares, is_packed=is_packed))
    waste = 1.0 if workload.is_sampled or is_packed else 1 / (1 - min(max_waste, 0.5))
    return StepLayout(
        num_micro_batches=_mean([layout.num_micro_batches for layout in layouts]),
        num_tokens=_mean([layout.num_tokens for layout in layouts]) * waste,
        num_squares=_mean([layout.num_squares for layout in layouts]) * waste,
        num_labels=_mean([layout.num_labels for layout in layouts]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _measured(
    rows: Sequence[RowLength], shares: list[list[list[int]]], *, is_packed: bool
) -> StepLayout:
    """Returns what the ranks wait for: the sum over micro-steps of the largest micro-batch."""
    tokens = squares = labels = 0.0
    for micro_step in zip(*shares, strict=True):
        sizes = []
        for part in micro_step:
            longest = max((rows[i].num_tokens for i in part), default=1)
            total = sum(rows[i].num_tokens for i in part)
            own_squares = sum(rows[i].num_tokens ** 2 for i in part)
            size = total if is_packed else len(part) * longest
            square = own_squares if is_packed else len(part) * longest**2
            sizes.append((size, square, sum(rows[i].num_labels for i in part)))
        tokens += max(size for size, _, _ in sizes)
        squares += max(square for _, square, _ in sizes)
        labels += max(count for _, _, count in sizes)
    return StepLayout(len(shares[0]), tokens, squares, labels)


def largest_micro_batch(
    config: Config, workload: Workload, world_size: int
) -> tuple[int, RowLength]:
    """Returns the rows and the length of the largest micro-batch: what must fit into memory."""
    engine = config.engine
    rows = min(engine.micro_batch_size, -(-engine.global_batch_size // world_size))
    return rows, workload.longest
