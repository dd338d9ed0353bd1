"""Named places at which a test lets a process fail: killed, frozen, out of disk. Off in a real run.

    POCL_FAILPOINT="checkpoint.before_rename=kill@2%0,atomic_write=enospc@7"

NAME=ACTION[@NTH][%RANK]: the NTH time this process (of that RANK) comes by, counted from 1; without
@NTH the first time. With POCL_FAILPOINT_ONCE naming a folder, each entry fires in one process only,
so that what is started again gets past it. Unset, a failpoint costs one look-up in a dictionary.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

VARIABLE = "POCL_FAILPOINT"
ONCE_VARIABLE = "POCL_FAILPOINT_ONCE"

_num_passed: Counter[str] = Counter()


def _raise_full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": lambda: time.sleep(3600.0),
    "enospc": _raise_full_disk,
}


def _is_first(entry: str) -> bool:
    """Returns whether no other process has done this; of several, one creates the file."""
    folder = os.environ.get(ONCE_VARIABLE)
    if folder is None:
        return True
    try:
        (Path(folder) / entry.replace("/", "_")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def failpoint(name: str) -> None:
    """Does what `POCL_FAILPOINT` asks for at this place; nothing when it is not set."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    _num_passed[name] += 1
    for entry in asked.split(","):
        place, _, rest = entry.partition("=")
        if place != name:
            continue
        rest, _, rank = rest.partition("%")
        action, _, nth = rest.partition("@")
        is_this_rank = not rank or os.environ.get("RANK") == rank
        if is_this_rank and _num_passed[name] == int(nth or 1) and _is_first(entry):
            ACTIONS[action]()
