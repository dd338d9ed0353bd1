"""Notices when Ray's daemons die under a driver.

Ray's own client waits a minute for a lost daemon and then ends the process from C++ with code 1:
no exception, no last word in `status.json`. So a thread looks after them, and says so first.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pocl_dist.processes import is_alive

DAEMONS = ("gcs_server", "raylet")
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 1.0
# Of a head that is elsewhere: one refused connection may be a network that stumbles.
CLUSTER_POLL_SECONDS = 5.0
MOST_REFUSALS = 3


class _Daemons:
    """The daemons of a private Ray: children of this process, from the moment they exist.

    Ray itself tells of them only when all have started, and waits in vain for one that has not.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def look(self) -> str:
        """Returns which one has ended; empty while all live, and before there are any."""
        for pid in _children():
            # A dead child is one of an earlier session that nobody has waited for.
            if (name := _name(pid)) in DAEMONS and is_alive(pid):
                self._names[pid] = name
        for pid, name in self._names.items():
            if not is_alive(pid):
                return f"Ray's {name} (process {pid}) has ended"
        return ""


def _children() -> list[int]:
    found: list[int] = []
    for task in os.scandir("/proc/self/task"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, Path(task.path, "children").read_text().split())
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


class _Head:
    """The head of a cluster, as seen by knocking at its port."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._num_refused = 0

    def look(self) -> str:
        """Returns why it counts as lost, empty while it does not."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CLUSTER_POLL_SECONDS).close()
        except OSError as error:
            self._num_refused += 1
            if self._num_refused >= MOST_REFUSALS:
                return f"the head of the Ray cluster at {self._address} is lost: {error}"
        else:
            self._num_refused = 0
        return ""


class DaemonWatch:
    """Calls `on_lost(reason)` from a thread, once, when a daemon dies while the context lasts.

    `address`: HOST:PORT of a cluster's head; None: the private Ray's, which may start within the
    context; set `is_up` when it has. At the end there is a last look, since Ray's shutdown hangs on
    a dead daemon.
    """

    def __init__(self, address: str | None, on_lost: Callable[[str], None]) -> None:
        self._look = _Daemons().look if address is None else _Head(address).look
        self._seconds = POLL_SECONDS if address is None else CLUSTER_POLL_SECONDS
        self._on_lost = on_lost
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self.is_up = address is not None

    def _watch(self) -> None:
        while not self._is_over.wait(self._seconds):
            if reason := self._look():
                # A start that fails kills them too, and is about to say why.
                if not self._is_over.wait(PATIENCE_SECONDS):
                    self._on_lost(reason)
                return

    def __enter__(self) -> DaemonWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self.is_up and (reason := self._look()):
            self._on_lost(reason)
