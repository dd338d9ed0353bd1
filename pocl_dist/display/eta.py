"""How fast it goes, and when it will be done: from recent work, because the cost of work changes.

Later stages have longer rows, and other rows than before: a mean over all that was done would tell
for a long while how things were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SmoothedRate:
    """Seconds per unit of work; what was done `half_life` units ago weighs half as much."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._units = 0.0
        self._seconds = 0.0

    def add(self, num_units: float, seconds: float) -> None:
        """Counts work that took `seconds`."""
        kept = 0.5 ** (num_units / self._half_life)
        # Both sums fade alike: their ratio is right from the first unit on.
        self._units = kept * self._units + num_units
        self._seconds = kept * self._seconds + seconds

    @property
    def seconds_per_unit(self) -> float | None:
        """Returns the smoothed cost of a unit; None before anything was done."""
        return self._seconds / self._units if self._units else None

    @property
    def units_per_second(self) -> float:
        """Returns the smoothed speed; 0 before anything was done."""
        return self._units / self._seconds if self._seconds else 0.0


@dataclass(frozen=True)
class Remaining:
    """What is left, in steps and seconds; None seconds: nothing was timed yet."""

    num_steps: int
    num_stage_steps: int
    seconds: float | None
    stage_seconds: float | None


class StepClock:
    """Times train steps, and tells how long stage and run will still take.

    A step costs what recent steps cost. What lies between steps (dev passes, checkpoints) comes
    seldom and in lumps: its share of all time so far is added.
    """

    HALF_LIFE_STEPS = 20.0

    def __init__(self, num_steps_of_stage: Sequence[int]) -> None:
        self._num_steps_of_stage = tuple(num_steps_of_stage)
        self._rate = SmoothedRate(self.HALF_LIFE_STEPS)
        self._step_seconds = 0.0
        self._started: float | None = None
        self._ended = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Counts a step that took `seconds` and ended at `now`, of a clock that only goes on."""
        if self._started is None:
            self._started = now - seconds
        self._rate.add(1.0, seconds)
        self._step_seconds += seconds
        self._ended = now

    def remaining(self, stage: int, num_done_in_stage: int) -> Remaining:
        """Returns what is left; a stage that converges earlier is shorter than that."""
        in_stage = self._num_steps_of_stage[stage] - num_done_in_stage
        total = in_stage + sum(self._num_steps_of_stage[stage + 1 :])
        per_step = self._rate.seconds_per_unit
        if per_step is None or self._started is None:
            return Remaining(total, in_stage, None, None)
        share = (self._ended - self._started) / self._step_seconds if self._step_seconds else 1.0
        per_step *= max(share, 1.0)
        return Remaining(total, in_stage, total * per_step, in_stage * per_step)


def duration(seconds: float | None) -> str:
    """Returns a time to wait as people say it: `45 s`, `12:05` minutes, `3:12:05`, `2 d 3 h`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{hours // 24} d {hours % 24} h"
