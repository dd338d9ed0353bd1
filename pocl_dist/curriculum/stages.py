"""The stages of the curriculum: which part of the ranking, for how long, at which values.

"Baby Step": stage i trains on the union of the parts 0..i, easy to hard (POCL
section 3.2). Needs no torch.
"""

from __future__ import annotations

import math

import numpy as np

from pocl_dist.config import CurriculumConfig
from pocl_dist.curriculum.schedules import stage_values
from pocl_dist.data.sampler import num_steps
from pocl_dist.errors import DataError
from pocl_dist.records import Stage


def stage_sizes(num_ranked: int, num_stages: int) -> tuple[int, ...]:
    """Returns the examples of each stage: equal parts added up, the remainder in the last."""
    if num_ranked < num_stages:
        raise DataError(f"{num_ranked} rows cannot fill curriculum.num_stages {num_stages} stages")
    part = num_ranked // num_stages
    return (*(part * (index + 1) for index in range(num_stages - 1)), num_ranked)


def make_stages(
    num_ranked: int, curriculum: CurriculumConfig, global_batch_size: int
) -> tuple[Stage, ...]:
    """Returns the stages of a ranking of `num_ranked` examples.

    `visits_per_example` gives all stages the same epochs, such that an example is visited so often
    in the mean; a fraction of an epoch is allowed.
    """
    num_stages = curriculum.num_stages
    sizes = stage_sizes(num_ranked, num_stages)
    epochs = curriculum.epochs_per_stage
    if curriculum.visits_per_example is not None:
        epochs = curriculum.visits_per_example / math.fsum(size / num_ranked for size in sizes)
    temperatures = stage_values(curriculum.temperature, num_stages)
    kd_ratios = stage_values(curriculum.kd_ratio, num_stages)
    return tuple(
        Stage(
            index=index,
            num_examples=size,
            temperature=temperatures[index],
            kd_ratio=kd_ratios[index],
            epochs=epochs,
            num_steps=num_steps(size, epochs, global_batch_size),
        )
        for index, size in enumerate(sizes)
    )


def order(num_ranked: int, ordering: str, seed: int) -> np.ndarray:
    """Returns the places of a ranking, easy to hard, in training order.

    `curriculum` keeps it; the controls are `reversed` (hard to easy) and `shuffled`, a
    permutation of the seed. The stages are cut from the result, so they stay cumulative.
    """
    if ordering == "reversed":
        return np.arange(num_ranked)[::-1]
    if ordering == "shuffled":
        return np.random.Generator(np.random.PCG64(seed)).permutation(num_ranked)
    if ordering == "curriculum":
        return np.arange(num_ranked)
    raise AssertionError(f"ordering {ordering!r}: the config allows no such value")
