"""Stages: sizes, visits and steps against counting, and the two control orderings."""

from __future__ import annotations

import math

import pytest

from pocl_dist.config import CurriculumConfig
from pocl_dist.curriculum.stages import make_stages, order, stage_sizes
from pocl_dist.errors import DataError


@pytest.mark.parametrize(
    ("num_ranked", "num_stages"), [(100, 4), (103, 4), (11435, 4), (7, 7), (9, 2), (5, 1)]
)
def test_parts_are_equal_and_the_last_takes_the_remainder(num_ranked: int, num_stages: int) -> None:
    sizes = stage_sizes(num_ranked, num_stages)
    parts = [after - before for before, after in zip((0, *sizes), sizes, strict=False)]
    assert parts[:-1] == [num_ranked // num_stages] * (num_stages - 1)
    assert parts[-1] == num_ranked // num_stages + num_ranked % num_stages
    assert sizes[-1] == num_ranked


def test_four_stages_of_eight_epochs_visit_an_example_twenty_times() -> None:
    stages = make_stages(100, CurriculumConfig(), 64)
    assert sum(stage.num_examples * stage.epochs for stage in stages) / 100 == 20
    assert [stage.num_steps for stage in stages] == [
        math.ceil(n * 8 / 64) for n in (25, 50, 75, 100)
    ]
    assert [stage.temperature for stage in stages] == pytest.approx([1, 4 / 3, 5 / 3, 2])
    assert [stage.kd_ratio for stage in stages] == pytest.approx([0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize("visits", [20.0, 3.0, 0.5])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 5])
def test_visits_per_example_are_the_same_for_any_number_of_stages(
    num_stages: int, visits: float
) -> None:
    curriculum = CurriculumConfig(num_stages=num_stages, visits_per_example=visits)
    stages = make_stages(1603, curriculum, 8)
    assert sum(s.num_examples * s.epochs for s in stages) / 1603 == pytest.approx(visits, rel=1e-12)
    assert sum(s.num_steps for s in stages) * 8 / 1603 == pytest.approx(
        visits, rel=0.01 if visits > 1 else 0.05
    )


def test_a_stage_smaller_than_a_batch_has_a_step() -> None:
    stages = make_stages(8, CurriculumConfig(epochs_per_stage=1.0), 64)
    assert [stage.num_steps for stage in stages] == [1, 1, 1, 1]


def test_fewer_rows_than_stages_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 rows cannot fill curriculum\.num_stages 4"):
        make_stages(3, CurriculumConfig(), 64)


def test_orderings_are_permutations_and_repeat_with_the_seed() -> None:
    in_order = list(range(100))
    assert order(100, "curriculum", 1).tolist() == in_order
    assert order(100, "reversed", 1).tolist() == in_order[::-1]
    shuffled = order(100, "shuffled", 1).tolist()
    assert sorted(shuffled) == in_order
    assert shuffled == order(100, "shuffled", 1).tolist()
    assert shuffled != order(100, "shuffled", 2).tolist()
    moved = sum(before != after for before, after in zip(in_order, shuffled, strict=True))
    assert moved > 80
