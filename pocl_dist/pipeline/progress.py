"""Progress of a pass over rows: a live bar with rows/s and ETA on a terminal, else some lines."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from pocl_dist.guards import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 5.0


class RowProgress:
    """Shows how many of `total` rows are done; a continued pass starts at `num_done`."""

    def __init__(self, title: str, total: int, num_done: int = 0) -> None:
        self._title = title
        self._total = total
        self._num_done = num_done
        self._num_before: int | None = None
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} rows"),
                TextColumn("{task.fields[speed]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns)
            self._task = self._bar.add_task(self._title, total=self._total, speed="")
            self._bar.update(self._task, completed=self._num_done)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_rows: int) -> None:
        """Counts finished rows and shows them."""
        self._num_done += num_rows
        now = time.monotonic()
        if self._num_before is None:  # the clock starts here: until now the models were loaded
            self._num_before, self._started = self._num_done, now
        num_timed = self._num_done - self._num_before
        rows_per_second = num_timed / max(now - self._started, 1e-9)
        if self._bar is not None and self._task is not None:
            speed = f"{rows_per_second:.1f} rows/s" if num_timed else ""
            self._bar.update(self._task, completed=self._num_done, speed=speed)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or self._num_done == self._total:
            line = f"{self._title}: {self._num_done}/{self._total} rows"
            if num_timed:
                left = (self._total - self._num_done) / rows_per_second
                line += f", {rows_per_second:.1f} rows/s, ETA {left:.0f} s"
            print(line, flush=True)
            self._last_line = now

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(printable(text), highlight=False, markup=False)
        else:
            print(printable(text), flush=True)


def say(text: str) -> None:
    """Prints a line about the step."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Prints a warning on stderr: something is allowed, but probably not what was meant."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
