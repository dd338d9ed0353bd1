"""A watchdog in every rank: a rank that hangs ends the job, by name, with every rank's stack.

Each rank writes a sign of life (host, process, phase, step) every few seconds. One whose main
thread does not move on for `timeout_seconds` raises the alarm by a file that all ranks watch; then
each writes its stacks, the lowest rank that lives says which rank the others waited for, and all
exit with code 71. No collective is used: those are what hangs. Ranks whose run directory is no
longer theirs, or whose starter was killed, end too: nobody else would end them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pocl_dist.errors import WorkerError
from pocl_dist.processes import is_alive

EXIT_CODE = 71
_ALARM = "alarm.json"
# A thread inside one of these waits for other ranks.
_WAITING_FILES = ("torch/distributed/", "deepspeed/comm/")


def _file_name(index: int) -> str:
    return f"rank-{index:05d}.json"


def _write(path: Path, value: Mapping[str, object]) -> None:
    """Writes JSON whole; not fsynced: it is about now."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _read(path: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    return {}


def _where() -> tuple[bool, str]:
    """Returns whether a thread waits in a collective, and the innermost frame of the main one."""
    frames = sys._current_frames()
    is_waiting, place = False, ""
    main = threading.main_thread().ident
    for ident, innermost in frames.items():
        frame = innermost
        while frame is not None:
            file = frame.f_code.co_filename
            is_waiting |= any(part in file for part in _WAITING_FILES)
            if ident == main and not place:
                place = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
    return is_waiting, place


class Watchdog:
    """One per rank. `beat` is called by the train loop whenever it gets on."""

    def __init__(
        self,
        folder: Path,
        job: str,
        index: int,
        world_size: int,
        timeout_seconds: float,
        on_hang: Callable[[str], None],
        abandoned: Callable[[], str] = lambda: "",
    ) -> None:
        """`job` tells this start of the ranks from earlier ones; `on_hang` gets the one line.

        `abandoned` says why nobody waits for these ranks any more; empty while somebody does.
        """
        self.folder = folder
        self.job = job
        self.index = index
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self.tick_seconds = min(5.0, timeout_seconds / 4)
        self.on_hang = on_hang
        self.abandoned = abandoned
        self._phase, self._step, self._beat_at = "start", -1, time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Starts watching."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if _read(self.folder / _ALARM).get("job") != self.job:
            (self.folder / _ALARM).unlink(missing_ok=True)
        self._thread.start()

    def beat(self, phase: str, step: int | None = None, *, is_bounded: bool = True) -> None:
        """Says that the main thread got on, and what it begins now.

        A phase that is not bounded may take any time, as loading a large model does; signs of life
        go on, and a collective in it still has the limit of the process group.
        """
        self._phase = phase
        self._beat_at = time.monotonic() if is_bounded else math.inf
        self._step = self._step if step is None else step

    def close(self) -> None:
        """Stops watching: what comes now may take any time."""
        self._is_over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def missing(self) -> str:
        """Returns a line about ranks that give no sign of life any more; empty if all do.

        Asked for when a collective broke: looks for the dead of this machine for up to a tick (a
        killed process closes its connections before it is gone), then waits two ticks more to see
        who of the other machines goes silent.
        """
        rows = self._rows()
        ends_at = time.monotonic() + self.tick_seconds
        while not (dead := [row for row in rows if self._is_dead(row)]):
            if time.monotonic() >= ends_at:
                break
            time.sleep(0.05)
        if not dead and any(row.get("host") != socket.gethostname() for row in rows):
            before = {row["rank"]: row.get("count") for row in rows}
            time.sleep(2.5 * self.tick_seconds)
            dead = [row for row in self._rows() if row.get("count") == before.get(row["rank"])]
        return "; ".join(f"{self._name(row)} is gone, {self._doing(row)}" for row in dead)

    def _rows(self) -> list[dict[str, object]]:
        rows = [_read(self.folder / _file_name(index)) for index in range(self.world_size)]
        return [row for row in rows if row.get("job") == self.job]

    def _is_dead(self, row: Mapping[str, object]) -> bool:
        if row.get("host") != socket.gethostname():
            return False
        return not is_alive(int(str(row["pid"])))

    @staticmethod
    def _name(row: Mapping[str, object]) -> str:
        return f"rank {row['rank']} (process {row['pid']} on {row['host']})"

    @staticmethod
    def _doing(row: Mapping[str, object]) -> str:
        return f"last seen after step {row['step']}, {row['phase']}"

    def _sign(self, count: int, **more: object) -> None:
        _write(
            self.folder / _file_name(self.index),
            {
                "job": self.job,
                "rank": self.index,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "phase": self._phase,
                "step": self._step,
                "count": count,
                **more,
            },
        )

    def _watch(self) -> None:
        count = 0
        while not self._is_over.is_set():
            with contextlib.suppress(OSError):  # a file server that is away is no hang
                self._sign(count := count + 1)
                if reason := self.abandoned():
                    print(
                        f"WATCHDOG: rank {self.index} ends: {reason}", file=sys.stderr, flush=True
                    )
                    os._exit(EXIT_CODE)
            alarm = _read(self.folder / _ALARM)
            if alarm.get("job") == self.job:
                self._end(count)
            if time.monotonic() - self._beat_at > self.timeout_seconds:
                with contextlib.suppress(OSError):  # on a full disk this rank ends all the same
                    _write(self.folder / _ALARM, {"job": self.job, "rank": self.index})
                self._end(count)
            self._is_over.wait(self.tick_seconds)

    def _end(self, count: int) -> None:
        """Writes this rank's stacks, waits for the others', names the culprit, exits."""
        is_waiting, place = _where()
        stacks = self.folder / f"stacks-rank-{self.index:05d}.txt"
        try:
            with stacks.open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            self._sign(count + 1, is_waiting=is_waiting, place=place)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(2.5 * self.tick_seconds)
        rows = self._rows()
        speakers = [row for row in rows if "place" in row]
        if not speakers or speakers[0]["rank"] == self.index:
            with contextlib.suppress(OSError, WorkerError):  # full disk, or the run is another's
                self.on_hang(self._verdict(rows))
            self._kill_frozen(rows)
        os._exit(EXIT_CODE)

    def _verdict(self, rows: Sequence[Mapping[str, object]]) -> str:
        """Returns one line: who holds up the others."""
        silent = [row for row in rows if "place" not in row]
        busy = [row for row in rows if "place" in row and not row["is_waiting"]]
        seconds = f"no progress for {self.timeout_seconds:g} s (engine.timeout_seconds)"
        stacks = f"stacks of all ranks in {self.folder}"
        if silent:
            named = "; ".join(
                f"{self._name(row)} does not answer, {self._doing(row)}" for row in silent
            )
        elif busy:
            named = "; ".join(
                f"{self._name(row)} hangs at {row['place']} "
                f"after step {row['step']}, {row['phase']}"
                for row in busy
            )
        else:
            # On several hosts: the link of one, if the files of all can still be read.
            is_one_host = len({row["host"] for row in rows}) == 1
            named = "all ranks wait in a collective: " + "; ".join(
                f"rank {row['rank']}{'' if is_one_host else ' on ' + str(row['host'])} "
                f"at {row['place']} after step {row['step']}"
                for row in rows
            )
        return f"{named}; {seconds}; {stacks}"

    def _kill_frozen(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Ends stopped ranks of this machine: no other signal reaches a stopped process."""
        for row in rows:
            if "place" not in row and row.get("host") == socket.gethostname():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(str(row["pid"])), signal.SIGKILL)
