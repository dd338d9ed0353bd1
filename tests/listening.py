"""Which TCP ports a process and its descendants listen on, from /proc alone."""

from __future__ import annotations

import os
from pathlib import Path

LISTEN = "0A"


def _children() -> dict[int, list[int]]:
    """Returns {pid: pids of its children}."""
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        found.setdefault(parent, []).append(int(path.parent.name))
    return found


def family(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    children, found = _children(), [pid]
    for member in found:  # grows while it is read
        found += children.get(member, [])
    return found


def _sockets(pid: int) -> set[str]:
    """Returns the inode numbers of a process's sockets."""
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # it has ended meanwhile
        pass
    return found


def listeners(pid: int) -> set[tuple[str, int]]:
    """Returns (local address in hex, port) of what a process and its descendants listen on."""
    mine = {inode for member in family(pid) for inode in _sockets(member)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[3] == LISTEN and fields[9] in mine:
                found.add((address, int(port, 16)))
    return found
