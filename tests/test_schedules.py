"""Values over the stages against the paper's table, the learning rate against torch's scheduler."""

from __future__ import annotations

import math

import pytest
import torch

from pocl_dist.config import ScheduleConfig
from pocl_dist.config.curriculum_sections import Schedule
from pocl_dist.curriculum.schedules import SCHEDULES, cosine_learning_rate, stage_values


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(1.0, 2.0, [1.0, 1.3333, 1.6667, 2.0]), (0.7, 1.0, [0.7, 0.8, 0.9, 1.0])],
)
def test_four_stages_have_the_published_values(
    start: float, end: float, expected: list[float]
) -> None:
    values = stage_values(ScheduleConfig(schedule="linear", start=start, end=end), 4)
    assert values == pytest.approx(expected, abs=1e-4)
    assert (values[0], values[-1]) == (start, end)  # to the bit


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [2, 3, 7])
def test_every_shape_goes_one_way_from_start_to_end(name: str, num_stages: int) -> None:
    schedule = ScheduleConfig.model_validate({"schedule": name, "start": 3.0, "end": 1.0})
    values = stage_values(schedule, num_stages)
    assert len(values) == num_stages
    assert values[0] == 3.0
    assert values[-1] == (3.0 if name == "constant" else 1.0)
    assert list(values) == sorted(values, reverse=True)


def test_cosine_is_half_a_cosine() -> None:
    values = stage_values(ScheduleConfig(schedule="cosine", start=1.0, end=2.0), 5)
    assert values == pytest.approx(
        [1.5 - 0.5 * math.cos(math.pi * index / 4) for index in range(5)]
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(schedule="linear", start=0.7, end=2.0), 1.0),
        (ScheduleConfig(schedule="cosine", start=0.7, end=2.0), 1.0),
        (ScheduleConfig(schedule="constant", start=0.7), 0.7),
        ([1.5], 1.5),
        (0.25, 0.25),
    ],
)
def test_one_stage_is_plain_distillation_unless_a_value_is_written(
    schedule: Schedule, expected: float
) -> None:
    assert stage_values(schedule, 1) == (expected,)


def test_numbers_and_tables_are_taken_as_written() -> None:
    assert stage_values(2.0, 3) == (2.0, 2.0, 2.0)
    assert stage_values([1.0, 4.0, 2.0], 3) == (1.0, 4.0, 2.0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_the_learning_rate_is_that_of_torch(num_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps, eta_min=1e-7)
    for step in range(num_steps + 1):
        expected = optimizer.param_groups[0]["lr"]
        assert cosine_learning_rate(step, num_steps, 1e-4, 1e-7, 0) == pytest.approx(
            expected, rel=1e-9
        )
        optimizer.step()
        scheduler.step()


def test_the_warm_up_rises_linearly_and_the_cosine_takes_the_rest() -> None:
    rates = [cosine_learning_rate(step, 14, 1.0, 0.1, 4) for step in range(14)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx(
        [cosine_learning_rate(step, 10, 1.0, 0.1, 0) for step in range(10)]
    )


def test_a_warm_up_longer_than_the_stage_stays_below_the_peak() -> None:
    assert max(cosine_learning_rate(step, 3, 1.0, 0.0, 10) for step in range(3)) == pytest.approx(
        3 / 11
    )
