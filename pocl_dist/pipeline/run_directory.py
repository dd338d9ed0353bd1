"""The run directory: names of its files, its status, and what each step was made from."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from pocl_dist.config import Config, compare_inputs, dump_config
from pocl_dist.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingInputError,
    RefusedError,
    exit_code_row,
)
from pocl_dist.files import (
    JSONValue,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    read_json,
)
from pocl_dist.pipeline.manifest import MANIFEST_NAME, SEAL_NAME
from pocl_dist.pipeline.status import TrainingStatus, scheduler_ids
from pocl_dist.pipeline.status_file import write_status_file

ATTEMPT_VARIABLE = "POCL_DIST_ATTEMPT"
"""Tells ranks that `run` or `distill` started which attempt they belong to."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run directory (fixed names, see the README)."""

    root: Path

    @property
    def rows(self) -> Path:
        """The training rows as they were read, a folder for each source; made anew at need."""
        return self.root / "rows"

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

    def checkpoint_steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, in order."""
        ends = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return sorted(int(end) for end in ends if end.isdecimal())

    @property
    def nonfinite(self) -> Path:
        """Batches on which a loss or gradient was not finite, one file per step and rank."""
        return self.root / "nonfinite"

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

    def write_status(
        self,
        state: str,
        exit_code: int | None,
        phase: str,
        reason: str = "",
        training: TrainingStatus | None = None,
    ) -> None:
        """Writes `status.json`; launchers lose exit codes, so the outcome must stand in a file.

        Without `training` what it said of that before stays.
        """
        value: dict[str, JSONValue] = {
            "state": state,
            "exit_code": exit_code,
            "retryable": exit_code is not None and exit_code_row(exit_code).is_retryable,
            "phase": phase,
            "reason": reason,
            **(training or self._training_status()).to_json(),
            "last_checkpoint": max(self.checkpoint_steps(), default=None),
            **scheduler_ids(),
            "attempt": int(os.environ.get(ATTEMPT_VARIABLE, "1")),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_status_file(self.status, value)

    def _training_status(self) -> TrainingStatus:
        # An outcome must be written also where the earlier one cannot be read.
        with contextlib.suppress(OSError, ValueError):
            return TrainingStatus.from_status(read_json(self.status))
        return TrainingStatus()

    def add_seconds(self, step: str, seconds: float) -> None:
        """Adds to the time spent on a step; a resumed step counts all its attempts."""
        try:
            timings = dict(read_json(self.timings)) if self.timings.exists() else {}
            timings[step] = float(timings.get(step) or 0.0) + seconds  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise MismatchError(f"{self.timings}: is damaged: {error}") from error
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


@contextlib.contextmanager
def kept_if_refused(root: Path) -> Iterator[None]:
    """Puts config, times and the sealed manifest back when the command in the context is refused.

    Otherwise a finished run that someone starts again by mistake, with another config
    or bad rows, would no longer verify, and its config.yaml would not be the one that
    its results were made with.
    """
    paths = [root / name for name in ("config.yaml", "timings.json", MANIFEST_NAME, SEAL_NAME)]
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
    except (ConfigError, DataError, MissingInputError, RefusedError, MismatchError):
        for path, data in before.items():
            if path.read_bytes() != data:
                atomic_write(path, partial(_write_bytes, data), len(data))
        raise


def _write_bytes(data: bytes, handle: IO[bytes]) -> None:
    handle.write(data)
