"""TensorBoard: event files in `trackers/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping

from pocl_dist.trackers.base import TrackedRun, under


class TensorBoardTracker:
    """Writes event files."""

    run_id = "."
    can_rewrite = True  # purge_step hides what an interrupted attempt wrote after the resumed step

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder), purge_step=run.resume_step + 1)
        if run.run_id is None:
            rows = "\n".join(f"| {key} | {value} |" for key, value in run.config.items())
            self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers as scalars."""
        for name, value in under(kind, values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()
