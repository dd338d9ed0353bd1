"""What a tracker is given, and what it does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pocl_dist.config.training_sections import LogConfig
from pocl_dist.files import JSONValue


@dataclass(frozen=True)
class TrackedRun:
    """A run, as it is known to trackers."""

    name: str
    settings: LogConfig
    config: Mapping[str, JSONValue]  # dotted key -> value
    folder: Path  # for files of this tracker; in the run directory
    resume_step: int  # the last step that stays, -1 for a run that begins
    run_id: str | None  # what the tracker called it before; None: it begins there


class Tracker(Protocol):
    """Takes the numbers of the lines of `metrics.jsonl`; is made, and called, in one thread."""

    run_id: str
    """By which the tracker finds the run again."""
    can_rewrite: bool
    """Whether steps that are sent again replace the earlier ones; else they are left out."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers, each under `kind/name`."""

    def close(self) -> None:
        """Ends this attempt: all is sent or on disk when it returns."""


def under(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers by the names that all trackers show."""
    return {f"{kind}/{name}": value for name, value in values.items()}
