"""The experiments by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos import kill_training
from tests.chaos.lab import Lab
from tests.chaos.result import Result

EXPERIMENTS: dict[str, Callable[[Lab], Result]] = {
    "kill_training": kill_training.run,
}
