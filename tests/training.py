"""Runs the real distill step on ranks and reads back what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from pocl_dist.config import load_config
from pocl_dist.failpoints import VARIABLE
from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.ranks import run_ranks, run_ranks_with_errors, start_ranks


def _distill(
    paths: list[str],
    overrides: list[str],
    stop_after: int | None,
    environment: dict[str, str] | None = None,
) -> None:
    os.environ.update(environment or {})
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


def distill(
    config: Path,
    world_size: int,
    *overrides: str,
    stop_after: int | None = None,
    environment: dict[str, str] | None = None,
) -> RunDirectory:
    """Plans and trains, up to `stop_after` steps if given; returns the run directory."""
    loaded = load_config([config], overrides)
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    run_ranks(_distill, world_size, [str(config)], list(overrides), stop_after, environment or {})
    run.stop_file.unlink(missing_ok=True)
    return run


def distill_with_errors(config: Path, world_size: int, failpoint: str) -> tuple[RunDirectory, list]:
    """As `distill`, with a failpoint that raises; returns also (value, error) of each rank."""
    loaded = load_config([config])
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    environment = {VARIABLE: failpoint}
    return run, run_ranks_with_errors(_distill, world_size, [str(config)], [], None, environment)


def distill_killed(config: Path, world_size: int, failpoint: str) -> RunDirectory:
    """As `distill`, with a failpoint that kills one rank; returns when all ranks have ended."""
    codes = distill_ended(config, world_size, {VARIABLE: failpoint})
    assert -signal.SIGKILL in codes, f"no rank was killed by {failpoint}: {codes}"
    return RunDirectory(Path(load_config([config]).run_dir))


def distill_ended(config: Path, world_size: int, environment: dict[str, str]) -> list[int | None]:
    """As `distill`, to whatever end it comes; returns the exit codes of the ranks."""
    loaded = load_config([config])
    make_plan(loaded, RunDirectory(Path(loaded.run_dir)))
    processes, _ = start_ranks(_distill, world_size, [str(config)], [], None, environment)
    try:
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert None not in codes, "a rank outlived its peer by a minute"
        return codes
    finally:
        for process in processes:
            process.kill()


def step_rows(run: RunDirectory) -> list[dict]:
    """Returns the lines of the steps."""
    return [row for row in read_json_lines(run.metrics) if row["kind"] == "step"]


def losses(run: RunDirectory) -> torch.Tensor:
    """Returns what each step measured, one row per step."""
    names = ("loss", "kd_loss", "ce_loss", "kl", "grad_norm")
    rows = [[row[name] for name in names] for row in step_rows(run)]
    return torch.tensor(rows, dtype=torch.float64)


def without_speed(rows: list[dict]) -> list[dict]:
    """Returns the lines without what differs from run to run."""
    measured = ("tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def checkpoint_tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    return {
        name: value
        for file in newest.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def _distill_astray(paths: list[str], stray: int) -> None:
    """As `_distill`, but the rank `stray` applies half the temperature it received."""
    from pocl_dist.curriculum.coordinator import Instruction
    from pocl_dist.pipeline import distill as step

    config = load_config(paths)
    received = Instruction.from_floats

    def halved(values: list[float]) -> Instruction:
        instruction = received(values)
        is_stray = os.environ["RANK"] == str(stray) and instruction.step == 2
        return (
            replace(instruction, temperature=instruction.temperature / 2)
            if is_stray
            else instruction
        )

    Instruction.from_floats = halved  # type: ignore[method-assign,assignment]
    step.distill_rank(config, RunDirectory(Path(config.run_dir)))


def distill_with_stray(config: Path, world_size: int, stray: int) -> list:
    """Trains with one rank that goes astray; returns (value, error) per rank."""
    loaded = load_config([config])
    make_plan(loaded, RunDirectory(Path(loaded.run_dir)))
    return run_ranks_with_errors(_distill_astray, world_size, [str(config)], stray)


class _SeenError(Exception):
    """Ends a run whose gradient has been looked at."""


def _first_gradient(path: str) -> dict[str, list]:
    from deepspeed.utils import safe_get_full_grad

    from pocl_dist.pipeline import distill, train_step

    seen: dict[str, list] = {}

    def look(engine, rank) -> float:  # type: ignore[no-untyped-def]
        for name, parameter in engine.module.named_parameters():
            seen[name] = safe_get_full_grad(parameter).double().tolist()
        raise _SeenError

    train_step.update = look
    config = load_config([path])
    with contextlib.suppress(_SeenError):
        distill.distill_rank(config, RunDirectory(Path(config.run_dir)))
    return seen


def first_gradient(config: Path, world_size: int) -> dict[str, torch.Tensor]:
    """Returns {parameter: whole gradient} of the first step, just before the update."""
    loaded = load_config([config])
    make_plan(loaded, RunDirectory(Path(loaded.run_dir)))
    gradients = run_ranks(_first_gradient, world_size, str(config))[0]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in gradients.items()}


def _buffer_dtypes(path: str) -> dict[str, str]:
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.pipeline.prepare import prepare_training

    config = load_config([path])
    training = prepare_training(config, RunDirectory(Path(config.run_dir)), join_process_group(60))
    return {name: str(value.dtype) for name, value in training.module.named_buffers()}


def buffer_dtypes(config: Path) -> dict[str, str]:
    """Returns {buffer of the trained module: dtype}."""
    loaded = load_config([config])
    make_plan(loaded, RunDirectory(Path(loaded.run_dir)))
    return run_ranks(_buffer_dtypes, 1, str(config))[0]


def plain_torch_weights(
    pair: tuple[Path, Path, Path], run: RunDirectory
) -> dict[str, torch.Tensor]:
    """Returns the weights of the same training as a plain loop, in float64, without our parts.

    Forward KL, T^2, mixing, global mean over tokens, clip 1, AdamW with decay on matrices,
    a cosine that restarts and an optimizer that is new in each stage. Only plan and
    sampler (the order) are ours.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocl_dist.data.sampler import StageSampler
    from pocl_dist.pipeline.plan_files import read_plan

    plan = read_plan(run.plan)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in pair[:2]
    )
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    rows = {row["id"]: row for row in map(json.loads, pair[2].read_text().splitlines())}
    for stage in plan.stages:
        groups = [
            [p for p in student.parameters() if (p.ndim >= 2) == is_matrix]
            for is_matrix in (True, False)
        ]
        optimizer = torch.optim.AdamW(
            [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, stage.num_steps, eta_min=1e-7
        )
        sampler = StageSampler(42, stage.index, stage.num_examples, stage.epochs, 8)
        for step in range(stage.num_steps):
            total, count = torch.zeros((), dtype=torch.float64), 0
            for position in sampler.batch(step):
                row = rows[plan.ranking[position]]
                prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n")[
                    "input_ids"
                ]
                answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
                ids = torch.tensor([prompt + answer])
                at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
                z = student(ids).logits[0, at, : len(tokenizer)]
                with torch.no_grad():
                    y = teacher(ids).logits[0, at, : len(tokenizer)]
                t = stage.temperature
                p, q = torch.softmax(y / t, -1), torch.softmax(z / t, -1)
                kl = (p * (p.log() - q.log())).sum() * t * t
                ce = torch.nn.functional.cross_entropy(z, torch.tensor(answer), reduction="sum")
                total, count = (
                    total + stage.kd_ratio * kl + (1 - stage.kd_ratio) * ce,
                    count + len(answer),
                )
            optimizer.zero_grad()
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return {name: value.detach().float() for name, value in student.named_parameters()}
