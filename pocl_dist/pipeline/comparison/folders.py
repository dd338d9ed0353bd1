"""Where the runs of a comparison lie, and their configs. Loads no torch.

RUN/shared/                            what all arms share; an ordinary run directory
RUN/runs/ARM/lr-0.008/seed-1/          an ordinary run directory
RUN/runs/ARM/lr-0.008/seed-1.yaml      its config: `pocl-dist run` with it goes on by hand
RUN/runs/ARM/lr-0.008/seed-1.log       what its training printed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocl_dist.config import Config, replaced
from pocl_dist.files import JSONValue
from pocl_dist.pipeline.comparison.arms import Arm
from pocl_dist.pipeline.run_directory import RunDirectory


@dataclass(frozen=True)
class RunKey:
    """One training: an arm with a learning rate and a seed."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Returns the run's folder, relative to that of the comparison."""
        return f"runs/{self.arm}/lr-{self.learning_rate!r}/seed-{self.seed}"


@dataclass(frozen=True)
class ComparedRun:
    """A run of the comparison: its config and its directory."""

    key: RunKey
    config: Config

    @property
    def run(self) -> RunDirectory:
        """Returns the run directory."""
        return RunDirectory(Path(self.config.run_dir))

    @property
    def config_file(self) -> Path:
        """Returns the file that the training is started with."""
        return self.run.root.with_name(f"{self.run.root.name}.yaml")

    @property
    def log_file(self) -> Path:
        """Returns where the training's output goes."""
        return self.run.root.with_name(f"{self.run.root.name}.log")


def run_of(base: Config, arm: Arm, learning_rate: float, seed: int) -> ComparedRun:
    """Returns a run of an arm; `base.run_dir` is the comparison's. ConfigError (64) names the key.

    Teacher and untrained student answer the test sets once: `with_baselines` says in which run.
    """
    key = RunKey(arm.name, learning_rate, seed)
    own: dict[str, JSONValue] = {
        "run_dir": str(Path(base.run_dir) / key.name),
        "seed": seed,
        "optimizer.learning_rate": learning_rate,
        "evaluate.baselines": False,
    }
    return ComparedRun(key, replaced(arm.config(base), own))


def with_baselines(run: ComparedRun) -> ComparedRun:
    """Returns the run with teacher and untrained student evaluated beside its export."""
    return ComparedRun(run.key, replaced(run.config, {"evaluate.baselines": True}))
