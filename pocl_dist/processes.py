"""Whether a process of this machine lives, by /proc."""

from __future__ import annotations

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
