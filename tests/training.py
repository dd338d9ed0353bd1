"""Runs the real distill step on ranks and reads back what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from pocl_dist.config import load_config
from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.ranks import run_ranks


def _distill(paths: list[str], overrides: list[str]) -> None:
    from pocl_dist.pipeline.distill import distill_rank

    config = load_config(paths, overrides)
    distill_rank(config, RunDirectory(Path(config.run_dir)))


def distill(config: Path, world_size: int, *overrides: str) -> RunDirectory:
    """Plans and trains; returns the run directory."""
    loaded = load_config([config], overrides)
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    run_ranks(_distill, world_size, [str(config)], list(overrides))
    return run


def step_rows(run: RunDirectory) -> list[dict]:
    """Returns the lines of the steps."""
    return [row for row in read_json_lines(run.metrics) if row["kind"] == "step"]


def checkpoint_tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    return {name: value for file in newest.glob("*.safetensors") for name, value in load_file(file).items()}
