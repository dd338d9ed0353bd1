"""Where experiments happen: a folder, a seed, tiny models, and undisturbed runs to compare with."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pocl_dist.config import load_config
from pocl_dist.failpoints import ONCE_VARIABLE, VARIABLE
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.chaos.compare import fingerprint
from tests.chaos.jobs import Job
from tests.chaos.result import Result

PACKAGE = Path(__file__).resolve().parents[2] / "pocl_dist"
_CALL = re.compile(r'failpoint\(\s*"([a-z_.]+)"\s*\)')


def known_failpoints() -> set[str]:
    """Returns the names of all failpoints in the code."""
    return {
        name for path in PACKAGE.rglob("*.py") for name in _CALL.findall(path.read_text("utf-8"))
    }


@dataclass(frozen=True)
class TrainingOutcome:
    """How the ranks of one start ended."""

    codes: list[int | None]
    errors: list[tuple[str, str]]  # (class, message) of ranks that raised
    seconds: float  # from the fault (or the first rank's end) to the last rank's

    @property
    def is_done(self) -> bool:
        """Returns whether every rank came to its end."""
        return not self.errors and all(code == 0 for code in self.codes)


def log_to_file(config_path: str) -> None:
    """Sends what this process and its libraries print to `log.txt` beside the config."""
    stream = Path(config_path).with_name("log.txt").open("ab")
    for number in (1, 2):
        os.dup2(stream.fileno(), number)


def _train(config_path: str, environment: dict[str, str]) -> None:
    log_to_file(config_path)
    os.environ.update(environment)
    from pocl_dist.pipeline.distill import distill_rank

    config = load_config([config_path])
    distill_rank(config, RunDirectory(Path(config.run_dir)))


@dataclass
class Lab:
    """What every experiment gets. `scale` makes the number of faults smaller or larger."""

    folder: Path
    seed: int = 42
    scale: float = 1.0
    _references: dict[str, dict[str, str]] = field(default_factory=dict)

    def count(self, num: int) -> int:
        """Returns how many of `num` faults to try."""
        return max(1, round(num * self.scale))

    def random(self, name: str) -> random.Random:
        """Returns the random numbers of one experiment: a function of seed and name."""
        return random.Random(f"{self.seed} {name}")

    def place(self, name: str) -> Path:
        """Returns an empty folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def result(self, fault: str) -> Result:
        """Returns a result to count in."""
        return Result(fault, self.seed)

    # ------------------------------------------------------------------------------ models, configs

    @cached_property
    def pair(self) -> tuple[Path, Path, Path]:
        """Returns (teacher of three layers, student, 24 training rows)."""
        from tests.tiny import write_llama, write_rows

        folder = self.folder / "pair"
        teacher = write_llama(folder / "teacher", hidden=32, layers=3, seed=1, num_phantom=8)
        student = write_llama(folder / "student", hidden=16, layers=2, seed=2)
        write_rows(folder / "test.jsonl", 8)
        return teacher, student, write_rows(folder / "train.jsonl", 24)

    def training_config(self, folder: Path, **sections: object) -> Path:
        """Writes the config of a training alone (27 steps, two stages), and plans it."""
        from pocl_dist.pipeline.plan import make_plan
        from tests.tiny import write_config

        defaults: dict[str, object] = {
            "curriculum": {"num_stages": 2, "epochs_per_stage": 6, "ordering": "shuffled"},
            "data": {"dev": str(self.pair[0].parent / "test.jsonl")},
            "dev": {"every": 6},
            "checkpoint": {"every": 2, "keep_last": 3},
            "engine": {"micro_batch_size": 4, "global_batch_size": 8, "timeout_seconds": 30},
        }
        path = write_config(folder, *self.pair, **_merged(defaults, sections))
        config = load_config([path])
        with contextlib.redirect_stdout(None):
            make_plan(config, RunDirectory(Path(config.run_dir)))
        return path

    def whole_config(self, folder: Path, has_all_steps: bool = False, **sections: object) -> Path:
        """Writes the config of a `run`; `has_all_steps`: also init-student, generate and cache."""
        from tests.tiny import write_config

        test_set = str(self.pair[0].parent / "test.jsonl")
        defaults: dict[str, object] = {
            "curriculum": {"num_stages": 2, "epochs_per_stage": 6, "ordering": "curriculum"},
            "data": {"dev": test_set, "eval": [test_set]},
            "dev": {"every": 6},
            "checkpoint": {"every": 2, "keep_last": 3},
            "generation": {"max_new_tokens": 6, "batch_size": 4},
            "ray": {"num_actors": 2, "shard_size": 4},
            "engine": {
                "world_size": 2, "micro_batch_size": 4, "global_batch_size": 8,
                "timeout_seconds": 30,
            },
        }  # fmt: skip
        if has_all_steps:
            data = {"dev": test_set, "eval": [test_set], "responses": "teacher"}
            defaults |= {
                "data": data,
                "teacher": {"source": "cache_hidden"},
                "models": {"student": {"init_layers": [0, 2]}},
            }
        return write_config(folder, *self.pair, **_merged(defaults, sections))

    # ---------------------------------------------------------------------------- undisturbed runs

    def reference(self, name: str, make: Callable[[], Path]) -> dict[str, str]:
        """Returns the fingerprint of the run directory that `make()` fills; made once per lab."""
        if name not in self._references:
            self._references[name] = fingerprint(make())
        return self._references[name]

    def trained(self) -> dict[str, str]:
        """Returns the fingerprint of an undisturbed training on two ranks."""

        def make() -> Path:
            config = self.training_config(self.place("calm-training"))
            outcome = self.train(config)
            assert outcome.is_done, outcome
            return config.parent / "run"

        return self.reference("training", make)

    def whole(self, has_all_steps: bool = False) -> tuple[dict[str, str], Path]:
        """Returns fingerprint and run directory of an undisturbed `run`."""
        name = "calm-all-steps" if has_all_steps else "calm-run"

        def make() -> Path:
            config = self.whole_config(self.place(name), has_all_steps)
            started = time.monotonic()
            job = Job(config.parent / "log.txt", "run", str(config))
            code, left = job.wait(400), job.leftovers()
            assert code == 0 and not left, (
                f"undisturbed run: {code}, {left}\n{job.output()[-3000:]}"
            )
            print(f"  undisturbed run: {time.monotonic() - started:.0f} s", flush=True)
            return config.parent / "run"

        return self.reference(name, make), self.folder / name / "run"

    # --------------------------------------------------------------------------------------- ranks

    def train(
        self,
        config: Path,
        world_size: int = 2,
        environment: Mapping[str, str] | None = None,
        disturb: Callable[[list], float | None] = lambda processes: None,
        seconds: float = 120,
    ) -> TrainingOutcome:
        """Starts the ranks of a training (forked: 5 s, not 20), disturbs them, sees how they end.

        `disturb(processes)` returns when the fault happened; None: at the first rank's end.
        """
        from tests.ranks import start_ranks

        processes, results = start_ranks(_train, world_size, str(config), dict(environment or {}))
        fault_at = disturb(processes)
        ends = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < ends:
            if fault_at is None and not all(process.is_alive() for process in processes):
                fault_at = time.monotonic()
            time.sleep(0.02)
        ended_at = time.monotonic()
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join(5)
        codes = [None if process in late else process.exitcode for process in processes]
        rows = [results.get(timeout=5) for code in codes if code == 0]
        errors = [(error[0], error[1]) for _, _, error in rows if error is not None]
        return TrainingOutcome(codes, errors, ended_at - (fault_at or ended_at))


def _merged(defaults: Mapping[str, object], sections: Mapping[str, object]) -> dict[str, object]:
    merged = dict(defaults)
    for name, keys in sections.items():
        below = merged.get(name)
        is_section = isinstance(keys, dict) and isinstance(below, dict)
        merged[name] = {**below, **keys} if is_section else keys  # type: ignore[dict-item]
    return merged


def failing_at(folder: Path, *entries: str) -> dict[str, str]:
    """Returns the environment in which each of `entries` happens once, in one process."""
    folder.mkdir(parents=True, exist_ok=True)
    return {VARIABLE: ",".join(entries), ONCE_VARIABLE: str(folder)}
