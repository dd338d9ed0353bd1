"""The train steps of a run, shown by rank 0: two bars and the figures of the latest step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pocl_dist.display import output
from pocl_dist.display.bars import Bar, lines_of
from pocl_dist.display.eta import Remaining, StepClock, duration

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text


class TrainingDisplay:
    """Stage, step, loss, speed, ETA of stage and run; off a terminal a line every few steps."""

    def __init__(self, num_steps_of_stage: Sequence[int], every: int) -> None:
        self._num_steps_of_stage = tuple(num_steps_of_stage)
        self._every = every
        self._clock = StepClock(num_steps_of_stage)
        self._left: Remaining | None = None
        self._stage = 0
        self._step = 0
        self._figures = "waiting for the first step"

    @property
    def _num_steps(self) -> int:
        """Returns the steps of the whole run, fewer where a stage has converged early."""
        return sum(self._num_steps_of_stage) if self._left is None else self._end

    @property
    def _end(self) -> int:
        assert self._left is not None
        return self._step + self._left.num_steps

    @contextlib.contextmanager
    def live(self) -> Iterator[TrainingDisplay]:
        """Shows the display while the context lasts."""
        with output.live(self):
            yield self

    def step(self, row: Mapping[str, object], num_done_in_stage: int, seconds: float) -> None:
        """Shows a finished step, given its line of `metrics.jsonl` and how long it took."""
        self._step, self._stage = int(str(row["step"])), int(str(row["stage"]))
        self._clock.add(seconds, time.monotonic())
        self._left = self._clock.remaining(self._stage, num_done_in_stage)
        self._figures = _figures(row)
        is_due = self._step % self._every == 0 or self._left.num_steps == 0
        if not is_due:
            return
        output.emit(
            "step",
            num_steps=self._end,
            num_stages=len(self._num_steps_of_stage),
            num_stage_steps=self._num_steps_of_stage[self._stage],
            step_in_stage=num_done_in_stage,
            eta_seconds=self._left.seconds,
            stage_eta_seconds=self._left.stage_seconds,
            **{key: value for key, value in row.items() if key != "kind"},
        )
        if output.mode() == "auto" and not output.is_live():
            output.say(
                f"step {self._step}/{self._end} {self._stage_words} {self._figures} "
                f"ETA {duration(self._left.seconds)} (stage {duration(self._left.stage_seconds)})"
            )

    @property
    def _stage_words(self) -> str:
        return f"stage {self._stage + 1}/{len(self._num_steps_of_stage)}"

    def note(self, text: str) -> None:
        """Prints a line above the live display."""
        output.say(text)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draws the live display: three lines that fit into 80 columns."""
        from rich.text import Text

        in_stage = self._num_steps_of_stage[self._stage]
        left = self._left or Remaining(self._num_steps, in_stage, None, None)
        rows = (
            (self._stage_words, in_stage, in_stage - left.num_stage_steps, left.stage_seconds),
            ("all", self._num_steps, self._num_steps - left.num_steps, left.seconds),
        )
        yield from lines_of(
            [
                Bar(title, done, total, f"{done}/{total} ETA {duration(seconds)}")
                for title, total, done, seconds in rows
            ],
            options,
        )
        yield Text(self._figures, no_wrap=True, overflow="crop")


def _figures(row: Mapping[str, object]) -> str:
    text = (
        f"T={row['temperature']:.2f} ratio={row['kd_ratio']:.2f} "
        f"loss={row['loss']:.4f} {row['tokens_per_second']:.0f} tok/s"
    )
    if row.get("on_policy_share"):
        text += f", answers of the student ({row['mean_answer_tokens']:.0f} tokens each)"
    return text
