"""Ways to ask a run to save and stop: SIGTERM, SIGUSR1, Ctrl-C, `control/stop`, a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pocl_dist.display.output import leave_terminal
from pocl_dist.pipeline.run_directory import RunDirectory

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


STARTED_VARIABLE = "POCL_DIST_STARTED"
"""When the attempt began: the machine's boot and its clock since; processes below take it over."""


def mark_start() -> None:
    """Starts the clock of `run.max_wallclock_minutes`, unless a process above has.

    A launcher may hand the variables of its machine to another one, whose clock began elsewhere.
    """
    if _started_at() is None:
        os.environ[STARTED_VARIABLE] = f"{_boot_id()} {_now()!r}"


def _started_at() -> float | None:
    boot_id, _, seconds = os.environ.get(STARTED_VARIABLE, "").partition(" ")
    return float(seconds) if seconds and boot_id == _boot_id() else None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _now() -> float:
    # Not the wall clock, which may jump; and the same in all processes of a machine.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def waiting_request() -> StopRequest | None:
    """Returns the request that this process's signals go to now; None when there is none."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, StopRequest) else None


class StopRequest:
    """A flag that signals set, looked at between steps. A second one ends the process at once."""

    def __init__(self, run: RunDirectory, max_wallclock_minutes: float | None) -> None:
        self._run = run
        self._ends_at: float | None = None
        if max_wallclock_minutes is not None:
            started = _started_at()
            self._ends_at = (_now() if started is None else started) + 60.0 * max_wallclock_minutes
        self._signal: int | None = None

    def install(self) -> None:
        """Takes over SIGTERM, SIGUSR1 and SIGINT, and a signal that an earlier request got."""
        earlier = waiting_request()
        if earlier is not None:
            self.take_over(earlier.signal)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Turns signals into the flag while the context lasts; only in the main thread.

        After it signals do what they did before; a request that waited before has heard of them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        earlier = waiting_request()
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if earlier is not None:
                earlier.take_over(self._signal)

    def take_over(self, number: int | None) -> None:
        """Counts a signal, if there was one, that another handler of this process got."""
        self._signal = self._signal or number

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Ctrl-C on a terminal reaches every process of the group, and a launcher may repeat it as
        # SIGTERM: only the same signal given twice means "now".
        if self._signal == number:
            leave_terminal()
            os._exit(128 + number)
        self._signal = self._signal or number

    @property
    def signal(self) -> int | None:
        """Returns the first signal that this process got."""
        return self._signal

    @property
    def was_signalled(self) -> bool:
        """Returns whether this process got a signal."""
        return self._signal is not None

    def is_asked(self) -> bool:
        """Returns whether there was a signal, the stop file is there, or the time is up."""
        is_time_up = self._ends_at is not None and _now() >= self._ends_at
        return self.was_signalled or is_time_up or self._run.stop_file.exists()
