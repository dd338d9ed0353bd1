"""Trackers besides `metrics.jsonl`. One place sends; none is required."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pocl_dist.errors import ConfigError
from pocl_dist.files import writing


class Tracker(Protocol):
    """Takes the numbers of one line of `metrics.jsonl`."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Writes event files for TensorBoard."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # purge_step hides what an interrupted attempt wrote after the step that is resumed.
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers under `kind/name`."""
        with writing(self._folder):  # an error of its thread comes out with a later number
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        with writing(self._folder):
            self._writer.close()


def open_trackers(wants_tensorboard: bool | None, folder: Path, resume_step: int) -> list[Tracker]:
    """Returns the trackers that are wanted; None means TensorBoard if it is installed."""
    is_installed = find_spec("tensorboard") is not None
    if wants_tensorboard and not is_installed:
        raise ConfigError(
            "log.tensorboard: true needs the package tensorboard (pip install 'pocl_dist[track]')"
        )
    if wants_tensorboard is False or not is_installed:
        return []
    return [TensorBoardTracker(folder / "tensorboard", resume_step)]
