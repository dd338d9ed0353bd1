"""Order of examples: a function of seed, stage and epoch, the same however many ranks share it."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from pocl_dist.data.sampler import StageSampler, num_steps, num_visits

# (examples, epochs, global batch): whole and fractional epochs, a stage below a batch, one row.
STAGES = [(24, 2.0, 8), (25, 1.0, 8), (10, 2.5, 4), (7, 1 / 3, 4), (5, 3.0, 16), (1, 4.0, 8)]


def sampler_of(
    num_examples: int, epochs: float, batch: int, *, seed: int = 42, stage: int = 0
) -> StageSampler:
    return StageSampler(seed, stage, num_examples, epochs, batch)


def all_batches(sampler: StageSampler) -> list[list[int]]:
    return [sampler.batch(step) for step in range(sampler.num_steps)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_epoch_visits_every_example_once_and_a_part_of_one_at_most_once(
    stage: tuple[int, float, int],
) -> None:
    num_examples, epochs, _ = stage
    visits = [position for batch in all_batches(sampler_of(*stage)) for position in batch]
    assert (
        len(visits) == num_visits(num_examples, epochs) == math.ceil(num_examples * epochs - 1e-9)
    )
    for start in range(0, len(visits), num_examples):
        epoch = visits[start : start + num_examples]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_examples))
    counts = Counter(visits)
    assert max(counts.values()) - min(counts.get(n, 0) for n in range(num_examples)) <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_all_batches_are_full_but_the_last(stage: tuple[int, float, int]) -> None:
    num_examples, epochs, size = stage
    sizes = [len(batch) for batch in all_batches(sampler_of(*stage))]
    assert len(sizes) == num_steps(*stage) == math.ceil(num_visits(num_examples, epochs) / size)
    assert all(found == size for found in sizes[:-1])
    assert 1 <= sizes[-1] <= size


@pytest.mark.parametrize(
    ("num_examples", "epochs", "batch", "wanted"),
    [
        (100, 8, 64, 13),
        (64, 1, 64, 1),
        (65, 1, 64, 2),
        (3, 0.1, 8, 1),
        (30, 0.1, 1, 3),
        (3, 7 / 3, 1, 7),
    ],
)
def test_the_number_of_steps_is_that_of_the_formula(
    num_examples: int, epochs: float, batch: int, wanted: int
) -> None:
    assert num_steps(num_examples, epochs, batch) == wanted


def test_a_step_can_be_asked_for_alone_and_twice() -> None:
    sampler = sampler_of(23, 3.0, 8)
    forward = all_batches(sampler)
    backward = [sampler.batch(step) for step in reversed(range(sampler.num_steps))]
    assert backward[::-1] == forward
    assert sampler_of(23, 3.0, 8).batch(5) == forward[5]


def test_a_run_interrupted_anywhere_sees_the_tail_of_the_whole_sequence() -> None:
    # The cursor is the step alone: what a resumed run asks for, also across a stage boundary.
    draw = random.Random(0)
    for _ in range(50):
        seed, batch = draw.randrange(1000), draw.randrange(1, 9)
        stages = [(draw.randrange(1, 20), draw.choice([0.5, 1.0, 2.5])) for _ in range(3)]

        def visits(start: int, seed: int, batch: int, stages: list) -> list[list[int]]:
            samplers = [sampler_of(*row, batch, seed=seed, stage=i) for i, row in enumerate(stages)]
            steps = [(s, step) for s in samplers for step in range(s.num_steps)]
            return [sampler.batch(step) for sampler, step in steps[start:]]

        whole = visits(0, seed, batch, stages)
        start = draw.randrange(len(whole))
        assert visits(start, seed, batch, stages) == whole[start:]


def test_the_order_differs_between_seeds_stages_and_epochs() -> None:
    orders = {
        tuple(sampler_of(50, 1.0, 50, seed=seed, stage=stage).batch(0))
        for seed in range(3)
        for stage in range(3)
    }
    assert len(orders) == 9
    two_epochs = sampler_of(50, 2.0, 50)
    assert two_epochs.batch(0) != two_epochs.batch(1)
    assert two_epochs.batch(0) != list(range(50))


def test_a_longer_stage_begins_like_the_shorter_one() -> None:
    assert all_batches(sampler_of(20, 3.0, 4))[:5] == all_batches(sampler_of(20, 1.0, 4))


def test_the_epoch_of_a_step_is_that_of_its_first_example() -> None:
    sampler = sampler_of(10, 3.0, 4)
    assert [sampler.epoch_of(step) for step in range(sampler.num_steps)] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_the_order_does_not_change_between_versions() -> None:
    # A resumed run relies on it. PCG64 and SeedSequence are stable by NumPy's policy.
    assert sampler_of(10, 1.0, 10).batch(0) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]


def test_an_epoch_is_numpys_permutation_of_seed_stage_and_epoch() -> None:
    """What runs of every earlier version were trained on, whatever the numbers are stored as."""
    import numpy as np

    for num_examples, stage in ((1, 0), (100, 1), (70_001, 3)):
        sampler = sampler_of(num_examples, 2.0, num_examples, seed=9, stage=stage)
        for epoch in (1, 0):
            seeds = np.random.SeedSequence([9, stage, epoch])
            generator = np.random.Generator(np.random.PCG64(seeds))
            assert sampler.batch(epoch) == generator.permutation(num_examples).tolist()
