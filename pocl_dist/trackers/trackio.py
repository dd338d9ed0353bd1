"""Trackio: a database in `trackers/trackio` (for `trackio show`), or a space on the hub."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from pocl_dist.trackers.base import TrackedRun, under


class TrackioTracker:
    """A run of trackio, found again by its name."""

    can_rewrite = False

    def __init__(self, run: TrackedRun) -> None:
        # Read when the library is imported; one process works for one run directory.
        os.environ["TRACKIO_DIR"] = str(run.folder.resolve())
        import trackio

        space = run.settings.trackio_space
        # A space may hold runs of other directories with this name.
        self.run_id = run.run_id or (
            run.name if space is None else f"{run.name}-{uuid.uuid4().hex[:6]}"
        )
        self._run = trackio.init(
            project=run.settings.project,
            name=self.run_id,
            space_id=space,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers of a step."""
        self._run.log(under(kind, values), step=step)

    def close(self) -> None:
        """Waits until all is written, or sent."""
        self._run.finish()
