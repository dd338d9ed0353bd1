"""Becomes another command that gets SIGTERM when its parent is gone, however that ended (Linux).

Run as `python -I -S death_signal.py PARENT_PID COMMAND...`. A killed comparison leaves no training
behind that nobody watches: it saves and ends (75). Imports nothing of ours: it starts in a moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> None:
    """Asks the kernel for the signal, then becomes the command; it survives `exec`."""
    parent, *command = words
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # gone before it was asked
        sys.exit(75)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
