"""Processes of this machine: whether one lives, by /proc, and which cores it gets. Linux."""

from __future__ import annotations

import os
from pathlib import Path


def started_at(pid: int) -> str | None:
    """Returns when a process began (clock ticks since boot); None when it is gone or a zombie.

    Process ids are used again: the same id with another start is another process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_alive(pid: int) -> bool:
    """Returns whether a process exists and is no zombie."""
    return started_at(pid) is not None


def cores_of(slot: int, num_jobs: int) -> set[int]:
    """Returns the cores of one of so many jobs at once: an equal share, or all if they are too few.

    A rank takes as many threads as it has cores, and threads of two jobs on the same cores spin.
    """
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::num_jobs] if len(cores) >= num_jobs else cores)
