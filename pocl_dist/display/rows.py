"""Progress of a pass over rows: a live bar on a terminal, lines elsewhere, JSON if asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from pocl_dist.display import output
from pocl_dist.display.bars import Bar, lines_of
from pocl_dist.display.eta import SmoothedRate, duration

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0


class RowProgress:
    """Shows how many of `total` rows are done; a continued pass starts at `num_done`."""

    def __init__(self, title: str, total: int, num_done: int = 0) -> None:
        self._title = title
        self._total = total
        self._num_done = num_done
        # A fifth of the pass: shards end in bursts, and their rows grow shorter.
        self._rate = SmoothedRate(max(total / 5, 1.0))
        self._tokens_per_row = SmoothedRate(max(total / 5, 1.0))
        self._last: float | None = None
        self._last_line = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(output.live(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def _left_seconds(self) -> float | None:
        per_row = self._rate.seconds_per_unit
        return None if per_row is None else per_row * (self._total - self._num_done)

    @property
    def _tokens_per_second(self) -> float:
        return self._rate.units_per_second * (self._tokens_per_row.seconds_per_unit or 0.0)

    def advance(self, num_rows: int, num_tokens: int = 0) -> None:
        """Counts finished rows, with the input tokens that they took, and shows them."""
        self._num_done += num_rows
        now = time.monotonic()
        if self._last is not None:  # the clock starts with the first shard: before, models loaded
            self._rate.add(num_rows, now - self._last)
            self._tokens_per_row.add(num_rows, num_tokens)
        self._last = now
        output.emit(
            "rows",
            title=self._title,
            done=self._num_done,
            total=self._total,
            rows_per_second=self._rate.units_per_second,
            tokens_per_second=self._tokens_per_second,
            eta_seconds=self._left_seconds,
        )
        is_due = now - self._last_line >= SECONDS_BETWEEN_LINES or self._num_done == self._total
        if output.mode() == "auto" and not output.is_live() and is_due:
            output.say(f"{self._title}: {self._num_done}/{self._total} rows{self._speed(', ')}")
            self._last_line = now

    def _speed(self, before: str = "") -> str:
        if not self._rate.units_per_second:
            return ""
        tokens = f", {self._tokens_per_second:.0f} tok/s" if self._tokens_per_second else ""
        return (
            f"{before}{self._rate.units_per_second:.1f} rows/s{tokens}, "
            f"ETA {duration(self._left_seconds)}"
        )

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        output.say(text)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draws the live line."""
        right = f"{self._num_done}/{self._total} rows{self._speed(', ')}"
        yield from lines_of([Bar(self._title, self._num_done, self._total, right)], options)
