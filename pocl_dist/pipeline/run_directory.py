"""The run directory: names of its files, its lock, its status, and what each step was made from."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.config import Config, compare_inputs, dump_config
from pocl_dist.errors import (
    BusyError,
    ConfigError,
    DataError,
    MismatchError,
    MissingInputError,
    RefusedError,
    exit_code_row,
)
from pocl_dist.files import (
    MANIFEST_NAME,
    SEAL_NAME,
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    read_json,
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run directory (fixed names, see the README)."""

    root: Path

    @property
    def difficulty(self) -> Path:
        """Scores of the student before training, one Parquet file per shard."""
        return self.root / "difficulty"

    @property
    def plan(self) -> Path:
        """The ranking and the stages."""
        return self.root / "plan.json"

    @property
    def init_student(self) -> Path:
        """The student that was cut from the teacher, if it was."""
        return self.root / "init_student"

    @property
    def teacher_cache(self) -> Path:
        """What the teacher says of every training row, with `teacher.source: cache_*`."""
        return self.root / "teacher_cache"

    @property
    def generated(self) -> Path:
        """The teacher's answers as a data set, and the shards that it is made of."""
        return self.root / "generated"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        """The distilled student, for `from_pretrained`."""
        return self.root / "export"

    @property
    def eval(self) -> Path:
        """One folder per test set."""
        return self.root / "eval"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: steps, dev metrics, stages, checkpoints."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """How the run stands or ended, for schedulers and people."""
        return self.root / "status.json"

    @property
    def timings(self) -> Path:
        """Seconds of each step, summed over attempts."""
        return self.root / "timings.json"

    @property
    def stop_file(self) -> Path:
        """Touch it and training saves and exits with code 75."""
        return self.root / "control" / "stop"

    @property
    def save_file(self) -> Path:
        """Touch it and training saves and goes on."""
        return self.root / "control" / "save"

    def write_config(self, config: Config) -> None:
        """Records the config with all defaults."""
        atomic_write_text(self.root / "config.yaml", dump_config(config))

    def write_status(self, state: str, exit_code: int | None, phase: str, reason: str = "") -> None:
        """Writes `status.json`; launchers lose exit codes, so the outcome must stand in a file."""
        value = {
            "state": state,
            "exit_code": exit_code,
            "retryable": exit_code is not None and exit_code_row(exit_code).is_retryable,
            "phase": phase,
            "reason": reason,
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        atomic_write_json(self.status, value)

    def add_seconds(self, step: str, seconds: float) -> None:
        """Adds to the time spent on a step; a resumed step counts all its attempts."""
        timings = dict(read_json(self.timings)) if self.timings.exists() else {}
        timings[step] = float(timings.get(step) or 0.0) + seconds  # type: ignore[arg-type]
        atomic_write_json(self.timings, timings)


def check_made_from(path: Path, expected: Mapping[str, JSONValue]) -> bool:
    """Returns whether the record `path` exists; raises MismatchError (78) if it names other inputs.

    A step writes such a record ({dotted key or input: value or digest}) before its first result, so
    that neither a finished nor a half-finished result is continued with another config.
    """
    if not path.exists():
        return False
    try:
        found = read_json(path)
    except ValueError as error:
        raise MismatchError(str(error)) from error
    compare_inputs(found, expected, path.parent if path.name == "inputs.json" else path)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holder(path: Path) -> dict[str, JSONValue] | None:
    """Returns what a lock says; None when it is gone, empty when it is half written or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _is_held(held: Mapping[str, JSONValue]) -> bool:
    """Returns whether a lock's holder may be alive; on another host nobody can tell from here."""
    pid = held.get("pid")
    return not (
        held.get("host") == socket.gethostname() and isinstance(pid, int) and not _is_alive(pid)
    )


def is_locked(root: Path) -> bool:
    """Returns whether a run that may be alive holds the run directory."""
    held = _holder(root / "lock")
    return held is not None and _is_held(held)


@contextlib.contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Holds `lock` in the run directory; raises BusyError (73) when a live run has it.

    A lock left by a dead process of this host is taken over. One left by another host cannot be
    checked from here: the message names it, and a person removes the file.
    """
    path, host = root / "lock", socket.gethostname()
    root.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            break
        except FileExistsError:
            held = _holder(path)
            if held is None:
                continue  # released meanwhile
            if _is_held(held):
                raise BusyError(
                    f"{root} is in use by process {held.get('pid')} on {held.get('host')} since "
                    f"{held.get('since')}; if that run is dead, remove {path}"
                ) from None
            path.unlink(missing_ok=True)
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with os.fdopen(handle, "w") as stream:
        json.dump({"host": host, "pid": os.getpid(), "since": since}, stream)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def kept_if_refused(root: Path) -> Iterator[None]:
    """Puts config, times and the sealed manifest back when the command in the context is refused.

    Otherwise a finished run that someone starts again by mistake, with another config
    or bad rows, would no longer verify, and its config.yaml would not be the one that
    its results were made with.
    """
    paths = [root / name for name in ("config.yaml", "timings.json", MANIFEST_NAME, SEAL_NAME)]
    before = {path: path.read_text() for path in paths if path.exists()}
    try:
        yield
    except (ConfigError, DataError, MissingInputError, RefusedError, MismatchError):
        for path, text in before.items():
            if path.read_text() != text:
                atomic_write_text(path, text)
        raise
