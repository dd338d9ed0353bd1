"""Which trackers there are, whether they are installed, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType

from pocl_dist.config.training_sections import LogConfig
from pocl_dist.errors import ConfigError
from pocl_dist.trackers.base import TrackedRun, Tracker


@dataclass(frozen=True)
class Entry:
    """A tracker: the package that it needs, and the extra of ours that installs it."""

    package: str
    extra: str
    class_name: str


TRACKERS: Mapping[str, Entry] = MappingProxyType(
    {
        "tensorboard": Entry("tensorboard", "track", "TensorBoardTracker"),
        "wandb": Entry("wandb", "track", "WandbTracker"),
        "mlflow": Entry("mlflow", "track", "MlflowTracker"),
        "trackio": Entry("trackio", "track", "TrackioTracker"),
    }
)


def is_installed(name: str) -> bool:
    """Returns whether the tracker's package is there; a folder of that name is none.

    A run with wandb leaves a folder `wandb` behind, which Python would take for a package.
    """
    spec = find_spec(TRACKERS[name].package)
    return spec is not None and spec.origin is not None


def wanted_trackers(settings: LogConfig) -> list[str]:
    """Returns the names of the trackers of a run: null means TensorBoard, if it is installed.

    Raises ConfigError (64) for one that is asked for and not installed.
    """
    if settings.trackers is None:
        return ["tensorboard"] if is_installed("tensorboard") else []
    for name in settings.trackers:
        if not is_installed(name):
            entry = TRACKERS[name]
            raise ConfigError(
                f"log.trackers: {name} needs the package {entry.package}: "
                f"pip install 'pocl_dist[{entry.extra}]'"
            )
    return list(dict.fromkeys(settings.trackers))


def opener(name: str) -> Callable[[TrackedRun], Tracker]:
    """Returns what opens a run with this tracker; its library is imported then."""

    def open_tracker(run: TrackedRun) -> Tracker:
        module = import_module(f"pocl_dist.trackers.{name}")
        tracker: Tracker = getattr(module, TRACKERS[name].class_name)(run)
        return tracker

    return open_tracker
