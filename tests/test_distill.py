"""The distill step: the same numbers however it is spread, interrupted or partitioned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocl_dist.pipeline.run_directory import RunDirectory
from tests.tiny import write_config, write_llama
from tests.training import checkpoint_tensors, distill, step_rows

Pair = tuple[Path, Path, Path]


def _losses(run) -> torch.Tensor:
    rows = step_rows(run)
    return torch.tensor([[row["loss"], row["kd_loss"], row["ce_loss"], row["kl"], row["grad_norm"]] for row in rows], dtype=torch.float64)


def test_one_rank_and_two_ranks_take_the_same_20_steps(tiny_pair: Pair, tmp_path: Path) -> None:
    sections = {"curriculum": {"num_stages": 2, "epochs_per_stage": 5, "ordering": "shuffled"}}
    one = distill(write_config(tmp_path / "one", *tiny_pair, **sections), 1)
    two = distill(write_config(tmp_path / "two", *tiny_pair, **sections), 2)
    assert len(step_rows(one)) >= 20
    torch.testing.assert_close(_losses(one), _losses(two), rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def reference(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns an uninterrupted ZeRO-3 run on two ranks."""
    return distill(write_config(tmp_path_factory.mktemp("reference"), *tiny_pair), 2)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_takes_the_same_steps_as_stage_3(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path, zero_stage: int
) -> None:
    run = distill(write_config(tmp_path / "n", *tiny_pair, engine={"zero_stage": zero_stage, "micro_batch_size": 3, "global_batch_size": 8}), 2)
    torch.testing.assert_close(_losses(run), _losses(reference), rtol=1e-5, atol=1e-9)
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(reference)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stop_at", [2, 3, 6])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tiny_pair: Pair, tmp_path: Path, world_size: int, stop_at: int
) -> None:
    whole = distill(write_config(tmp_path / "whole", *tiny_pair), world_size)
    config = write_config(tmp_path / "parts", *tiny_pair)
    run = distill(config, world_size, stop_after=stop_at)
    assert len(step_rows(run)) == stop_at
    assert not run.export.exists()
    distill(config, world_size)
    assert _without_speed(step_rows(run)) == _without_speed(step_rows(whole))
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def _without_speed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_bytes")} for row in rows]


def test_a_run_resumed_on_another_world_size_goes_on_with_the_same_losses(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair)
    distill(config, 2, stop_after=4)
    run = distill(config, 1)
    torch.testing.assert_close(_losses(run), _losses(reference), rtol=1e-5, atol=1e-9)
