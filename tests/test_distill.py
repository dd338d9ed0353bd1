"""The distill step: the same numbers however it is spread, interrupted or partitioned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_takes_the_same_steps_as_stage_3(tiny_pair: Pair, tmp_path: Path, zero_stage: int) -> None:
    reference = distill(write_config(tmp_path / "3", *tiny_pair), 2)
    run = distill(write_config(tmp_path / "n", *tiny_pair, engine={"zero_stage": zero_stage, "micro_batch_size": 3, "global_batch_size": 8}), 2)
    torch.testing.assert_close(_losses(run), _losses(reference), rtol=1e-5, atol=1e-9)
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(reference)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
