"""`pocl-dist` commands as processes that can be killed, and the processes that they start.

Every process below a job carries a mark in its environment, or has a parent that does (Ray's
workers overwrite their environment with a title), so that one which outlives its job is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "POCL_CHAOS_JOB"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Process:
    """One process; its start time tells it from a later one with the same number."""

    pid: int
    started_at: str
    parent: int
    state: str
    command: str

    def signal(self, number: int) -> bool:
        """Sends a signal unless the process is gone; returns whether it was sent."""
        if read_process(self.pid) is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


def read_process(pid: int) -> Process | None:
    """Returns what /proc says of a process; None when it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    return Process(pid, fields[19], int(fields[1]), fields[0], command.decode(errors="replace"))


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def processes_of(mark: str, seen: dict[int, str]) -> list[Process]:
    """Returns the living processes of a job, and adds them to `seen` ({pid: start})."""
    own = f"{MARK}={mark}".encode()
    everything = [
        process
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and (process := read_process(int(entry.name))) is not None
    ]
    found: dict[int, Process] = {}
    for process in everything:
        if seen.get(process.pid) == process.started_at or _has_mark(process.pid, own):
            found[process.pid] = process
    while more := [p for p in everything if p.pid not in found and p.parent in found]:
        found.update({process.pid: process for process in more})
    seen.update({process.pid: process.started_at for process in found.values()})
    return list(found.values())


_started: list[Job] = []


def end_all() -> None:
    """Kills what is left of every job that this process has started."""
    for job in _started:
        job.end()
    _started.clear()


class Job:
    """A command under way. Its output goes to a file, which is kept for diagnosis."""

    def __init__(
        self, log: Path, *words: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        self._seen: dict[int, str] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            stream.write(f"$ pocl-dist {' '.join(words)}  {dict(environment or {})}\n")
            stream.flush()
            self.offset = stream.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pocl_dist", *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **(environment or {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(self)

    def output(self) -> str:
        """Returns what the job has printed so far."""
        with self.log.open(errors="replace") as stream:
            stream.seek(self.offset)
            return stream.read()

    def processes(self) -> list[Process]:
        """Returns the living processes of the job."""
        return processes_of(self.mark, self._seen)

    def having(self, *words: str) -> list[Process]:
        """Returns those whose command line holds one of `words`; `^word`: begins with it."""
        return [
            process
            for process in self.processes()
            if any(
                process.command.startswith(word[1:]) if word[0] == "^" else word in process.command
                for word in words
            )
        ]

    def wait_for(self, happened: Callable[[], object], seconds: float = 90) -> bool:
        """Returns True once `happened()` is true, False when the job ended or time is up."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if happened():
                return True
            if self.process.poll() is not None:
                return bool(happened())
            time.sleep(POLL_SECONDS)
        return False

    def wait(self, seconds: float = 180) -> int:
        """Returns the exit code; -1000 when the job did not end in time (it is ended then)."""
        ends = time.monotonic() + seconds
        while self.process.poll() is None:
            self.processes()  # so that children are known before their parents are gone
            if time.monotonic() > ends:
                self.end()
                return -1000
            time.sleep(4 * POLL_SECONDS)
        return int(self.process.returncode)

    def leftovers(self, seconds: float = 12) -> list[str]:
        """Returns commands of processes that are alive so long after the job; and ends them."""
        ends = time.monotonic() + seconds
        while self.processes() and time.monotonic() < ends:
            time.sleep(4 * POLL_SECONDS)
        left = [process.command[:120] for process in self.processes()]
        self.end()
        return left

    def end(self) -> None:
        """Kills what is left of the job, by process id."""
        for process in self.processes():
            process.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
