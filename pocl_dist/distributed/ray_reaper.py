"""Ends what a private Ray leaves when its driver is killed, and removes its folder.

Ray's agents notice up to two minutes later that their daemon is gone, and nobody removes the folder
with token, sockets and logs. Run as `python -I -S ray_reaper.py FOLDER` with a pipe as standard
input that only the driver holds: its end, however it came, is the end of that pipe. Imports nothing
of ours, so that it starts in a moment and needs no memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0


def has_open(pid: int, folder: str) -> bool:
    """Returns whether a process has a file below `folder` open, as all of Ray's have their logs.

    Their command lines and environments do not tell: Ray writes titles over them.
    """
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(f"{folder}/"):
                    return True
    except OSError:  # gone, or another user's
        return False
    return False


def kill_users(folder: str) -> int:
    """Kills every process that has a file below `folder` open; returns how many there were."""
    num_killed = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(int(entry.name))  # before the look: the number may be reused
            try:
                if has_open(int(entry.name), folder):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    num_killed += 1
            finally:
                os.close(handle)
    return num_killed


def main() -> None:
    """Waits for the driver's end; returns when nothing uses the folder any more."""
    folder = os.path.realpath(sys.argv[1])
    while sys.stdin.buffer.read(1):
        pass
    ends = time.monotonic() + PATIENCE_SECONDS
    # Two looks without a find: a daemon may have been starting another process at the first.
    num_quiet = 0
    while num_quiet < 2 and time.monotonic() < ends:
        num_quiet = 0 if kill_users(folder) else num_quiet + 1
        time.sleep(POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
