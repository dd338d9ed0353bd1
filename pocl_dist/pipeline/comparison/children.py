"""Trainings as processes of their own: `pocl-dist run` with a config file, output in a log.

They are ordinary runs: a stop of the comparison is handed to them as SIGTERM, they save and end
with 75, and the same command of the comparison goes on with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.config import Config, dump_config
from pocl_dist.config.shipped import PACKAGE
from pocl_dist.display.output import say
from pocl_dist.errors import StoppedError, error_of
from pocl_dist.files import atomic_write_text
from pocl_dist.pipeline.comparison import death_signal
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.stop_request import StopRequest

POLL_SECONDS = 0.2
SECONDS_BETWEEN_LINES = 60.0
TAIL_BYTES = 4096


@dataclass
class Child:
    """A training under way."""

    compared: ComparedRun | None  # None: no run of the table
    process: subprocess.Popen[bytes]
    started: float
    last_line: float
    slot: int = 0  # which of the trainings at once: its share of the cores
    is_told: bool = False  # to save and end

    def tell(self) -> None:
        """Asks the training to save and end, once: a second SIGTERM would mean "now"."""
        if not self.is_told and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.is_told = True


def _command(words: Sequence[str]) -> list[str]:
    guard = [sys.executable, "-I", "-S", death_signal.__file__, str(os.getpid())]
    return [*guard, sys.executable, "-m", "pocl_dist", *words]


def _environment() -> dict[str, str]:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    # Its own session: Ctrl-C is for the comparison, which asks its children to save.
    with log.open("ab") as stream:
        return subprocess.Popen(
            _command(words),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _write_config(config: Config, path: Path) -> None:
    text = dump_config(config)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        atomic_write_text(path, text)


def cores_of(slot: int, num_jobs: int) -> set[int]:
    """Returns the cores of one of so many trainings at once: an equal share, all if too few.

    A rank takes as many threads as it has cores; those of two trainings on the same cores spin.
    """
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::num_jobs] if len(cores) >= num_jobs else cores)


def start_training(compared: ComparedRun, slot: int, num_jobs: int) -> Child:
    """Starts all steps of a run but its test sets, which are answered when it is chosen."""
    _write_config(compared.config, compared.config_file)
    words = ["run", str(compared.config_file), "data.eval=[]"]
    now = time.monotonic()
    process = _start(words, compared.log_file)
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, cores_of(slot, num_jobs))
    return Child(compared, process, now, now, slot)


def run_alone(command: str, config: Config, config_file: Path, stop: StopRequest) -> None:
    """Runs one command on a config and waits; raises the error that it ended with."""
    _write_config(config, config_file)
    log = config_file.with_suffix(".log")
    say(f"{command}: {config.run_dir} (log: {log})")
    child = Child(None, _start([command, str(config_file)], log), 0.0, 0.0)
    with _ended([child]):
        while child.process.poll() is None:
            time.sleep(POLL_SECONDS)
            if stop.is_asked():
                child.tell()
    code = child.process.returncode
    if code:
        reason = f"{command} of {config.run_dir} ended with {code}: {last_words(log)}"
        raise error_of(code, reason) or RuntimeError(reason)


def last_words(log: Path) -> str:
    """Returns the last line that is no blank of a log."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def _ended(children: Sequence[Child]) -> Iterator[None]:
    """Leaves no process behind: what still runs when the context ends saves and is waited for."""
    try:
        yield
    finally:
        for child in children:
            child.tell()
        for child in children:
            child.process.wait()


def train_all(
    next_run: Callable[[], ComparedRun | None],
    on_end: Callable[[ComparedRun, int, float], None],
    num_jobs: int,
    stop: StopRequest,
) -> None:
    """Trains what `next_run` gives, `num_jobs` at a time, until it gives None and all have ended.

    `on_end` gets each run, its exit code and seconds. When a stop is asked for, or a run ended with
    75 by itself, all are asked to save, and StoppedError (75) is raised when they have ended.
    """
    children: list[Child] = []
    is_stopping = False
    with _ended(children):
        while True:
            is_stopping |= stop.is_asked()
            if is_stopping:
                for child in children:
                    child.tell()
            while not is_stopping and len(children) < num_jobs:
                compared = next_run()
                if compared is None:
                    break
                slot = min(set(range(num_jobs)) - {child.slot for child in children})
                children.append(start_training(compared, slot, num_jobs))
            if not children:
                break
            time.sleep(POLL_SECONDS)
            _say_progress(children)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                assert child.compared is not None
                seconds = time.monotonic() - child.started
                on_end(child.compared, child.process.returncode, seconds)
                is_stopping |= child.process.returncode == StoppedError.exit_code
    if is_stopping:
        raise StoppedError("stopped on request; the same command goes on from there")


def _say_progress(children: Sequence[Child]) -> None:
    now = time.monotonic()
    for child in children:
        if child.compared is not None and now - child.last_line >= SECONDS_BETWEEN_LINES:
            child.last_line = now
            row = _last_step(child.compared.run.metrics)
            at = f"step {row['step']}, loss {row['loss']:.4f}" if row else "no step yet"
            say(f"   {child.compared.key.name}: {at}, {now - child.started:.0f} s")


def _last_step(metrics: Path) -> dict[str, float]:
    """Returns the newest line about a step, empty without one."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = stream.read().decode(errors="replace").split("\n")[1:-1]
    steps = [json.loads(line) for line in lines if line.startswith('{"kind": "step"')]
    return steps[-1] if steps else {}
