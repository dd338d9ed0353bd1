"""Values that change from stage to stage, and the learning rate within a stage. Needs no torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from pocl_dist.config import ScheduleConfig
from pocl_dist.config.curriculum_sections import Schedule

# With a single stage there is nothing to go between: plain distillation, T = 1
# and ratio 1 (POCL 3.2).
PLAIN_VALUE = 1.0


def _linear(start: float, end: float, progress: float) -> float:
    return start * (1 - progress) + end * progress


def _half_cosine(start: float, end: float, progress: float) -> float:
    return _linear(start, end, (1 - math.cos(math.pi * progress)) / 2)


def _constant(start: float, end: float, progress: float) -> float:
    return start


# To add a shape: a function of (start, end, progress 0..1) here, and its name
# in config.ScheduleConfig.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _half_cosine,
    "constant": _constant,
}


def stage_values(schedule: Schedule, num_stages: int) -> tuple[float, ...]:
    """Returns one value per stage: of a number, of a table as written, or of a schedule's shape.

    With one stage `linear` and `cosine` give 1.0, which is plain distillation
    for temperature and ratio.
    """
    if isinstance(schedule, list):
        return tuple(float(value) for value in schedule)
    if not isinstance(schedule, ScheduleConfig):
        return (float(schedule),) * num_stages
    if num_stages == 1 and schedule.schedule != "constant":
        return (PLAIN_VALUE,)
    end = schedule.start if schedule.end is None else schedule.end
    last = max(1, num_stages - 1)
    shape = SCHEDULES[schedule.schedule]
    return tuple(shape(schedule.start, end, index / last) for index in range(num_stages))


def cosine_learning_rate(
    step_in_stage: int, num_steps: int, peak: float, minimum: float, warmup_steps: int
) -> float:
    """Returns the learning rate of a step, counted from 0 in its stage.

    Linear warm-up to `peak`, then torch's CosineAnnealingLR over the steps that are left: `minimum`
    is reached when all of them are done.
    """
    if step_in_stage < warmup_steps:
        return (
            peak * (step_in_stage + 1) / (warmup_steps + 1)
        )  # the step after the warm-up has the peak
    progress = (step_in_stage - warmup_steps) / max(1, num_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def step_in_cosine(
    step_in_stage: int, num_steps: int, restart_steps: Sequence[int]
) -> tuple[int, int]:
    """Returns (steps since the cosine last began, its length) at a step of a stage.

    It begins with the stage and anew before each of `restart_steps`, which ascend.
    """
    index = bisect_right(restart_steps, step_in_stage)
    start = restart_steps[index - 1] if index else 0
    end = restart_steps[index] if index < len(restart_steps) else num_steps
    return step_in_stage - start, end - start
