"""The lock of a run directory: one writer at a time, with a lease and an attempt number.

The lock file names its holder and is touched every `REFRESH_SECONDS`. It may be taken over when its
holder is a dead process of this machine, or when it was not touched for `LEASE_SECONDS`, both times
read from the file server's clock, because the clocks of two hosts differ. Each holder has a higher
attempt number than the one before; a writer that was thought dead and wakes up finds another number
in the file and cannot commit anything: `check_not_fenced` is asked before every rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from pocl_dist.errors import BusyError, WorkerError
from pocl_dist.files import JSONValue, guarded, read_json, writing
from pocl_dist.pipeline.run_directory import ATTEMPT_VARIABLE
from pocl_dist.processes import started_at

REFRESH_SECONDS = 10.0
LEASE_SECONDS = 3 * REFRESH_SECONDS


def _place() -> str:
    """Returns what a process id means something in: machine, boot and container."""
    boot, container = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {container}"


def _holder(path: Path) -> dict[str, JSONValue] | None:
    """Returns what a lock says; None when it is gone, empty when it is half written or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _age_seconds(path: Path) -> float:
    """Returns how long ago `path` was touched, by the clock of the server that keeps it."""
    probe = path.with_name(f".tmp-clock-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_refreshed(path: Path) -> bool:
    """Returns whether `path` is touched while one waits for a lease, by a clock that only runs on.

    For a lock from the future: the file server's clock was set back and does not tell its age.
    """
    try:
        before, ends = path.stat().st_mtime_ns, time.monotonic() + LEASE_SECONDS
        while time.monotonic() < ends:
            time.sleep(REFRESH_SECONDS / 4)
            if path.stat().st_mtime_ns != before:
                return True
    except FileNotFoundError:  # given back
        pass
    return False


def _is_held(path: Path, held: Mapping[str, JSONValue], is_patient: bool = False) -> bool:
    """Returns whether a lock's holder may still be at work; `is_patient`: it may take a lease."""
    pid = held.get("pid")
    if held.get("place") == _place() and isinstance(pid, int):
        return started_at(pid) == held.get("started_at")
    age_seconds = _age_seconds(path)
    if is_patient and age_seconds < -REFRESH_SECONDS:
        return _is_refreshed(path)
    return age_seconds < LEASE_SECONDS


def is_locked(root: Path) -> bool:
    """Returns whether a run that may be alive holds the run directory."""
    held = _holder(root / "lock")
    return held is not None and _is_held(root / "lock", held)


def check_free(root: Path) -> None:
    """Raises BusyError (73) when a run that may be alive holds the run directory."""
    held = _holder(root / "lock")
    if held is not None and _is_held(root / "lock", held):
        raise _busy(root, held)


def _busy(root: Path, held: Mapping[str, JSONValue]) -> BusyError:
    return BusyError(
        f"{root} is in use by process {held.get('pid')} on {held.get('host')} since "
        f"{held.get('since')}; if that run is dead, its lock ends by itself "
        f"{LEASE_SECONDS:g} s after its last sign of life"
    )


def _last_attempt(root: Path) -> int:
    """Returns the highest attempt number that the run directory knows of."""
    numbers = [0]
    for name in ("lock", "status.json"):
        value = (_holder(root / name) or {}).get("attempt")
        numbers.append(value if isinstance(value, int) else 0)
    return max(numbers)


def _bury(path: Path, held: Mapping[str, JSONValue]) -> None:
    """Removes a dead lock; of all who find it dead, one moves this very file away."""
    grave = path.with_name(f".tmp-{path.name}-{os.getpid()}-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(grave)
    found = _holder(grave)
    if found is not None and found != held:  # somebody was faster and this is their new lock
        grave.rename(path)
    grave.unlink(missing_ok=True)


def _take(root: Path) -> int:
    """Creates the lock and returns its attempt number; raises BusyError (73)."""
    path = root / "lock"
    while True:
        held = _holder(path)
        if held is not None:
            if _is_held(path, held, is_patient=True):
                raise _busy(root, held)
            _bury(path, held)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            continue
        attempt, pid = max(_last_attempt(root), _number(held)) + 1, os.getpid()
        value = {
            "attempt": attempt,
            "host": socket.gethostname(),
            "pid": pid,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "place": _place(),
            "started_at": started_at(pid),
        }
        try:
            data = json.dumps(value).encode()
            with writing(path, len(data)), os.fdopen(handle, "wb") as stream:
                stream.write(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return attempt


def _number(held: Mapping[str, JSONValue] | None) -> int:
    value = (held or {}).get("attempt")
    return value if isinstance(value, int) else 0


def _keep_alive(path: Path, attempt: int, is_over: threading.Event) -> None:
    """Touches the lock until told to stop, or until it is another's."""
    while not is_over.wait(REFRESH_SECONDS):
        with contextlib.suppress(OSError):  # a server that is away for a while
            if _number(_holder(path)) != attempt:
                return
            os.utime(path)


@contextlib.contextmanager
def run_lock(root: Path) -> Iterator[int]:
    """Holds the run directory and yields the attempt number; raises BusyError (73) if another does.

    The number also goes into the environment, for the ranks that are started below.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        path, attempt = root / "lock", _take(root)
    before = os.environ.get(ATTEMPT_VARIABLE)
    os.environ[ATTEMPT_VARIABLE] = str(attempt)
    is_over = threading.Event()
    keeper = threading.Thread(target=_keep_alive, args=(path, attempt, is_over), daemon=True)
    keeper.start()
    try:
        # By number: inside a lock of another run the environment names that one's attempt.
        with guarded(root, partial(_check_attempt, root, attempt)):
            yield attempt
    finally:
        is_over.set()
        keeper.join()
        if before is None:
            del os.environ[ATTEMPT_VARIABLE]
        else:
            os.environ[ATTEMPT_VARIABLE] = before
        if _number(_holder(path)) == attempt:
            path.unlink(missing_ok=True)


def abandonment(root: Path) -> str:
    """Returns why this attempt is over though its ranks live: fenced, or its holder was killed.

    Empty while the lock is this attempt's and alive, and without an attempt number.
    """
    own = os.environ.get(ATTEMPT_VARIABLE)
    if own is None:
        return ""
    held = _holder(root / "lock")
    if held is None or _number(held) != int(own):
        return f"{root} is no longer held by attempt {own}"
    if not _is_held(root / "lock", held):
        return f"process {held.get('pid')}, which holds {root} for attempt {own}, is gone"
    return ""


def check_not_fenced(root: Path) -> None:
    """Raises WorkerError (71) when the run directory is no longer this attempt's to write.

    Without an attempt number in the environment (a library user without lock) nothing is checked.
    """
    own = os.environ.get(ATTEMPT_VARIABLE)
    if own is not None:
        _check_attempt(root, int(own))


def _check_attempt(root: Path, own: int) -> None:
    held = _holder(root / "lock")
    if _number(held) != own:
        now = f"attempt {_number(held)} has it" if held else "nobody holds its lock"
        raise WorkerError(
            f"{root}: this is attempt {own}, and {now}; nothing was written, so that two runs "
            "do not write the same files"
        )
