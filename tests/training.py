"""Runs the real distill step on ranks and reads back what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from pocl_dist.config import load_config
from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.ranks import run_ranks


def _distill(paths: list[str], overrides: list[str], stop_after: int | None) -> None:
    from pocl_dist.errors import StoppedError
    from pocl_dist.pipeline import distill as step

    config = load_config(paths, overrides)
    run = RunDirectory(Path(config.run_dir))
    if stop_after is not None:  # a person touches the stop file while this step is under way
        log_step = step._log_step

        def touch_and_log(training, instruction, *rest) -> None:  # type: ignore[no-untyped-def]
            log_step(training, instruction, *rest)
            if instruction.step + 1 == stop_after and training.rank.is_main:
                run.stop_file.parent.mkdir(exist_ok=True)
                run.stop_file.touch()

        step._log_step = touch_and_log
    try:
        step.distill_rank(config, run)
    except StoppedError:
        if stop_after is None:
            raise


def distill(config: Path, world_size: int, *overrides: str, stop_after: int | None = None) -> RunDirectory:
    """Plans and trains, up to `stop_after` steps if given; returns the run directory."""
    loaded = load_config([config], overrides)
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    run_ranks(_distill, world_size, [str(config)], list(overrides), stop_after)
    run.stop_file.unlink(missing_ok=True)
    return run


def step_rows(run: RunDirectory) -> list[dict]:
    """Returns the lines of the steps."""
    return [row for row in read_json_lines(run.metrics) if row["kind"] == "step"]


def checkpoint_tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    return {name: value for file in newest.glob("*.safetensors") for name, value in load_file(file).items()}
