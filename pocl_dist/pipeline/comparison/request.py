"""What the command line of `compare` asks for, checked before anything else is looked at."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocl_dist.errors import UsageError
from pocl_dist.files import JSONValue
from pocl_dist.pipeline.comparison.ablations import ABLATIONS
from pocl_dist.pipeline.comparison.arms import METHODS

MAX_SEED = 2**31


@dataclass(frozen=True)
class CompareRequest:
    """Methods, seeds, the grid of learning rates (empty: the config's own) and ablations."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lr_grid: tuple[float, ...] = ()
    ablate: tuple[str, ...] = ()
    jobs: int = 1
    is_training: bool = True

    def to_json(self) -> dict[str, JSONValue]:
        """Returns what the table depends on."""
        return {
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "lr_grid": list(self.lr_grid),
            "ablate": list(self.ablate),
        }


def parse_request(
    methods: str,
    seeds: str,
    lr_grid: str | None = None,
    ablate: str | None = None,
    jobs: int = 1,
    is_training: bool = True,
) -> CompareRequest:
    """Returns the request of the options, comma-separated lists; UsageError (2) with what is wrong.

    The order of methods and seeds is kept: the first seed chooses the learning rates.
    """
    if jobs < 1:
        raise UsageError(f"--jobs: {jobs} is not allowed: must be 1 or more")
    return CompareRequest(
        methods=tuple(_known("--methods", _words("--methods", methods), METHODS)),
        seeds=tuple(_seed(word) for word in _words("--seeds", seeds)),
        lr_grid=tuple(sorted(_rate(word) for word in _words("--lr-grid", lr_grid)))
        if lr_grid is not None
        else (),
        ablate=tuple(_known("--ablate", _words("--ablate", ablate), ABLATIONS))
        if ablate is not None
        else (),
        jobs=jobs,
        is_training=is_training,
    )


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option}: {text!r} has an empty entry; it is a list like a,b,c")
    repeated = sorted({word for word in words if words.count(word) > 1})
    if repeated:
        raise UsageError(f"{option}: {', '.join(repeated)} is given twice")
    return words


def _known(option: str, words: Sequence[str], allowed: Iterable[str]) -> Sequence[str]:
    names = list(allowed)
    for word in words:
        if word not in names:
            near = difflib.get_close_matches(word, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"{option}: unknown {word!r}; {hint}Allowed: {', '.join(names)}")
    return words


def _seed(word: str) -> int:
    if not word.isascii() or not word.isdecimal() or len(word) > 10 or int(word) >= MAX_SEED:
        raise UsageError(
            f"--seeds: {word!r} is not allowed: whole numbers from 0 to {MAX_SEED - 1}"
        )
    if word != str(int(word)):
        raise UsageError(f"--seeds: write {int(word)}, not {word!r}")
    return int(word)


def _rate(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise UsageError(f"--lr-grid: {word!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--lr-grid: {word} is not allowed: must be finite and above 0")
    return value
