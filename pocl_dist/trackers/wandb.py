"""Weights & Biases: offline files for `wandb sync`, or its server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from pocl_dist.trackers.base import TrackedRun, under


class WandbTracker:
    """A run of wandb; attempts have one id, so the server joins them.

    Only what we send goes there: no host, user, command line, git remote, list of packages, code or
    console output.
    """

    can_rewrite = False  # its history only grows

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run_id = run.run_id or uuid.uuid4().hex[:12]
        self._folder = run.folder
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        mode = run.settings.wandb_mode
        self._run = wandb.init(
            project=run.settings.project,
            name=run.name,
            id=self.run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run.folder),
            config=dict(run.config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers as one row of the history; `step` is the axis."""
        self._run.log({**under(kind, values), "step": step})

    def close(self) -> None:
        """Waits until all is written, or sent."""
        self._run.finish()
        # To its debug log in the user's cache; `verify` counts a link as a finding.
        for path in self._folder.rglob("*"):
            if path.is_symlink():
                path.unlink()
