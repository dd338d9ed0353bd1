"""Ways to ask a run to save and stop: SIGTERM, SIGUSR1, Ctrl-C, and the file `control/stop`."""

from __future__ import annotations

import os
import signal
from types import FrameType

from pocl_dist.pipeline.run_directory import RunDirectory

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag that signals set, looked at between steps. A second one ends the process at once."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._signal: int | None = None

    def install(self) -> None:
        """Takes over SIGTERM, SIGUSR1 and SIGINT."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Ctrl-C on a terminal reaches every process of the group, and a launcher may repeat it as
        # SIGTERM: only the same signal given twice means "now".
        if self._signal == number:
            os._exit(128 + number)
        self._signal = self._signal or number

    @property
    def was_signalled(self) -> bool:
        """Returns whether this process got a signal."""
        return self._signal is not None

    def is_asked(self) -> bool:
        """Returns whether this process got a signal or the stop file is there."""
        return self.was_signalled or self._run.stop_file.exists()
