"""Starts a rendered script apart from the terminal: it goes on when who submitted it has left."""

from __future__ import annotations

import subprocess
from pathlib import Path


def start_apart(script: Path, log: Path) -> int:
    """Starts a shell script in a session of its own, its output at the end of `log`.

    Returns its process id.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            ["bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process.pid
