"""Training from the cache: the losses of the online teacher, and no teacher loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocl_dist.config import load_config
from pocl_dist.models.loading import load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.caching import (
    Pair,
    cached_by_ranks,
    copy_of,
    distill_from_cache,
    losses,
    write_cache_config,
)
from tests.ranks import run_ranks_with_errors
from tests.test_run import ENVIRONMENT, command
from tests.training import _distill, distill, step_rows


@pytest.fixture(scope="module")
def online(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Returns the losses of two ranks beside their teacher, at three temperatures."""
    folder = tmp_path_factory.mktemp("online")
    path = write_cache_config(folder, tiny_pair, teacher={"source": "online"})
    rows = step_rows(distill(path, 2))
    assert {row["temperature"] for row in rows} == {1.0, 1.5, 3.0}
    return losses(rows)


@pytest.fixture(scope="module")
def hidden(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDirectory]:
    """Returns (config, run directory) of cached hidden states."""
    folder = tmp_path_factory.mktemp("hidden")
    path = write_cache_config(folder, tiny_pair, teacher={"cache_engine": "zero3"})
    return path, cached_by_ranks(path, 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_from_cached_hidden_states_are_those_of_the_online_teacher(
    hidden: tuple[Path, RunDirectory], online: torch.Tensor, tmp_path: Path, world_size: int
) -> None:
    path, whole = hidden
    scratch = [f"run.scratch_dir={tmp_path / 'scratch'}"] if world_size == 2 else []
    run = distill_from_cache(path, world_size, copy_of(whole, tmp_path / "run"), *scratch)
    torch.testing.assert_close(losses(step_rows(run)), online, rtol=1e-6, atol=0)
    copies = {file.name for file in (tmp_path / "scratch").rglob("*.safetensors")}
    cached = {file.name for file in run.teacher_cache.glob("*.safetensors")}
    assert copies == (cached if scratch else set())


def test_losses_from_top_k_with_all_tokens_are_those_of_the_online_teacher(
    tiny_pair: Pair, online: torch.Tensor, tmp_path: Path
) -> None:
    num_tokens = len(load_tokenizer(ModelFolder(tiny_pair[0], "teacher")))
    teacher = {"source": "cache_topk", "top_k": num_tokens, "cache_engine": "zero3"}
    path = write_cache_config(tmp_path, tiny_pair, teacher=teacher)
    run = distill_from_cache(path, 2, cached_by_ranks(path, 1))
    torch.testing.assert_close(losses(step_rows(run)), online, rtol=1e-5, atol=1e-9)


def test_an_online_run_may_go_on_from_the_exact_cache(
    hidden: tuple[Path, RunDirectory], online: torch.Tensor, tmp_path: Path
) -> None:
    path, whole = hidden
    run = copy_of(whole, tmp_path / "run")
    where = f"run_dir={run.root}"
    distill(path, 2, where, "teacher.source=online", stop_after=2)
    distill_from_cache(path, 2, run)
    torch.testing.assert_close(losses(step_rows(run)), online, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("shard-*.safetensors", "MismatchError", "content changed"),
        ("head.safetensors", "MismatchError", "content changed"),
        ("shard-*.json", "MissingInputError", "training rows are not cached"),
        ("summary.json", "MissingInputError", "holds no finished cache"),
    ],
)
def test_distill_refuses_a_cache_that_is_damaged_or_not_whole_on_all_ranks(
    hidden: tuple[Path, RunDirectory], tmp_path: Path, file: str, kind: str, message: str
) -> None:
    path, whole = hidden
    run = copy_of(whole, tmp_path / "run")
    damaged = sorted(run.teacher_cache.glob(file))[0]
    if damaged.suffix == ".json":
        damaged.unlink()
    else:
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    rows = run_ranks_with_errors(_distill, 2, [str(path)], [f"run_dir={run.root}"], None)
    for _, error in rows:
        assert error[0] == kind and message in error[1] and "pocl-dist cache" in error[1]


def test_the_command_run_caches_on_ranks_and_ends_with_the_losses_of_the_online_teacher(
    tiny_pair: Pair, online: torch.Tensor, tmp_path: Path
) -> None:
    path = write_cache_config(
        tmp_path,
        tiny_pair,
        teacher={"cache_engine": "zero3"},
        engine={"world_size": 2, "micro_batch_size": 3, "global_batch_size": 8},
    )
    done = subprocess.run(
        command("run", str(path)), env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory(Path(load_config([path]).run_dir))
    torch.testing.assert_close(losses(step_rows(run)), online, rtol=1e-6, atol=0)
    listed = json.loads((run.root / "manifest.json").read_text())["files"]
    names = {row["path"] for row in listed}
    assert {"teacher_cache/head.safetensors", "teacher_cache/summary.json"} <= names
    assert json.loads(run.timings.read_text())["cache"] > 0
    verified = subprocess.run(command("verify", str(run.root)), capture_output=True)
    assert verified.returncode == 0
    again = subprocess.run(
        [sys.executable, "-m", "pocl_dist", "cache", str(path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 0 and "cache: not needed" in again.stdout
