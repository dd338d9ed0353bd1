"""Lines with a bar in them that fit into any width: what does not fit is cut on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import ConsoleOptions
    from rich.text import Text

SHORTEST = 5  # a bar below that tells nothing; the room is for words then


@dataclass(frozen=True)
class Bar:
    """How much of something is done, with words on both sides."""

    left: str
    done: int
    total: int
    right: str


def lines_of(bars: Sequence[Bar], options: ConsoleOptions) -> Iterator[Text]:
    """Yields a line per bar, aligned, as wide as the terminal; in ASCII where it knows no more."""
    from rich.text import Text

    left = max(len(bar.left) for bar in bars)
    right = max(len(bar.right) for bar in bars)
    width = options.max_width - left - right - 2
    full, empty = ("#", "-") if options.ascii_only else ("━", "─")
    for bar in bars:
        num_full = width * bar.done // max(bar.total, 1)
        parts: list[tuple[str, str]] = []
        if width >= SHORTEST:
            parts = [(full * num_full, "bar.complete"), (empty * (width - num_full), "bar.back")]
            parts.append((" ", ""))
        words = Text.assemble(f"{bar.left:<{left}} ", *parts, f"{bar.right:>{right}}")
        words.no_wrap, words.overflow = True, "crop"
        yield words
