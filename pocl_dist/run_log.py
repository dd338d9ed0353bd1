"""What a run tells: `metrics.jsonl`, and a live display on a terminal or plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.failpoints import failpoint
from pocl_dist.files import atomic_write_text, read_json_lines, writing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class MetricsLog:
    """Appends JSON lines to `metrics.jsonl`; a resumed run first drops those it writes again.

    `unfinished`: kinds that it writes again also at `resume_step` itself.
    """

    def __init__(self, path: Path, resume_step: int, unfinished: Collection[str] = ()) -> None:
        kept = [
            row
            for row in read_json_lines(path)
            if int(row["step"]) < resume_step + (row["kind"] not in unfinished)  # type: ignore
        ]
        # The line of a step is written after the step: at the resumed step it is already there.
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path
        # Unbuffered: after a full disk nothing is left that `close` would fail to write again.
        self._stream = path.open("ab", buffering=0)

    def write(self, row: dict[str, object]) -> None:
        """Appends one object, floats unrounded. Half a line on a full disk counts as none."""
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        with writing(self._path, len(data)):
            failpoint("metrics.write")
            while data:
                data = data[self._stream.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def numbers_of(row: Mapping[str, object]) -> dict[str, float]:
    """Returns the numbers of a line, as trackers take them; those of a list each by its own name.

    Names of a list count from 1: `rouge_l_1` is the first quarter's.
    """
    flat: dict[str, object] = {}
    for key, value in row.items():
        parts = enumerate(value, start=1) if isinstance(value, list) else ()
        flat |= {f"{key}_{number}": part for number, part in parts} or {key: value}
    return {
        key: float(value)
        for key, value in flat.items()
        if isinstance(value, int | float) and key != "step"
    }


class TrainingDisplay:
    """One live line: stage, step, loss, speed, ETA; outside a terminal a line every few steps."""

    def __init__(self, num_steps: int, every: int) -> None:
        self._num_steps = num_steps
        self._every = every
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._first_step: int | None = None

    @contextmanager
    def live(self) -> Iterator[TrainingDisplay]:
        """Shows the display while the context lasts."""
        if not sys.stdout.isatty():
            yield self
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("distill {task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as self._progress:
            self._task = self._progress.add_task("", total=self._num_steps)
            yield self
        self._progress = None

    def step(self, row: dict[str, object], num_stages: int) -> None:
        """Shows a finished step, given its line of `metrics.jsonl`."""
        step, stage = int(str(row["step"])), int(str(row["stage"]))
        if self._first_step is None:
            self._first_step, self._started = step - 1, time.monotonic()
        text = (
            f"stage {stage + 1}/{num_stages} T={row['temperature']:.2f} "
            f"ratio={row['kd_ratio']:.2f} "
            f"loss={row['loss']:.4f} {row['tokens_per_second']:.0f} tok/s"
        )
        if row.get("on_policy_share"):
            text += f", answers of the student ({row['mean_answer_tokens']:.0f} tokens each)"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or step == self._num_steps:
            done = step - self._first_step
            left = (time.monotonic() - self._started) / max(done, 1) * (self._num_steps - step)
            print(f"step {step}/{self._num_steps} {text} ETA {left:.0f} s", flush=True)

    def note(self, text: str) -> None:
        """Prints a line above the live display."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)
