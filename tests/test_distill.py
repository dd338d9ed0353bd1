"""The distill step: the same numbers however it is spread, interrupted or partitioned."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.tiny import write_config
from tests.training import (
    buffer_dtypes,
    checkpoint_tensors,
    distill,
    distill_with_stray,
    first_gradient,
    losses,
    plain_torch_weights,
    step_rows,
    without_speed,
)

Pair = tuple[Path, Path, Path]


def test_one_rank_and_two_ranks_take_the_same_20_steps(tiny_pair: Pair, tmp_path: Path) -> None:
    sections = {"curriculum": {"num_stages": 2, "epochs_per_stage": 5, "ordering": "shuffled"}}
    one = distill(write_config(tmp_path / "one", *tiny_pair, **sections), 1)
    two = distill(write_config(tmp_path / "two", *tiny_pair, **sections), 2)
    assert len(step_rows(one)) >= 20
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-5, atol=1e-9)


def test_the_first_gradient_is_the_same_on_one_and_two_ranks_to_a_millionth_of_its_norm(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    one = first_gradient(write_config(tmp_path / "one", *tiny_pair), 1)
    two = first_gradient(write_config(tmp_path / "two", *tiny_pair), 2)
    assert one.keys() == two.keys()
    norm = torch.cat([value.flatten() for value in one.values()]).norm()
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert norm > 1e-3
    assert difference < 1e-6 * norm


@pytest.fixture(scope="module")
def reference(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns an uninterrupted ZeRO-3 run on two ranks."""
    return distill(write_config(tmp_path_factory.mktemp("reference"), *tiny_pair), 2)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_takes_the_same_steps_as_stage_3(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path, zero_stage: int
) -> None:
    run = distill(
        write_config(
            tmp_path / "n",
            *tiny_pair,
            engine={"zero_stage": zero_stage, "micro_batch_size": 3, "global_batch_size": 8},
        ),
        2,
    )
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-5, atol=1e-9)
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(reference)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def reference_alone(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns the same run on one rank."""
    return distill(write_config(tmp_path_factory.mktemp("alone"), *tiny_pair), 1)


# 3 is the end of the first stage: the resumed run has to reset the optimizer, not the stopped one.
@pytest.mark.parametrize(("world_size", "stop_at"), [(1, 3), (2, 3), (2, 7)])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tiny_pair: Pair,
    reference: RunDirectory,
    reference_alone: RunDirectory,
    tmp_path: Path,
    world_size: int,
    stop_at: int,
) -> None:
    whole = reference if world_size == 2 else reference_alone
    config = write_config(tmp_path, *tiny_pair)
    run = distill(config, world_size, stop_after=stop_at)
    assert len(step_rows(run)) == stop_at
    assert not run.export.exists()
    distill(config, world_size)
    assert without_speed(step_rows(run)) == without_speed(step_rows(whole))
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_the_trained_weights_equal_those_of_a_plain_torch_loop(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path
) -> None:
    expected = plain_torch_weights(tiny_pair, reference)
    for name, value in checkpoint_tensors(reference).items():
        if name.startswith("weights.model."):
            theirs = expected[name.removeprefix("weights.model.")]
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=2e-6)


def test_the_export_opens_in_plain_transformers_and_holds_the_last_weights(
    reference: RunDirectory,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(reference.export)
    tokenizer = AutoTokenizer.from_pretrained(reference.export)
    tensors = checkpoint_tensors(reference)
    for name, value in model.named_parameters():
        assert torch.equal(value, tensors[f"weights.model.{name}"])
    ids = tokenizer("### Instruction:\nsay cat\n\n### Response:\n", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]


def test_a_student_without_teacher_learns_by_cross_entropy_alone(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    _, student, rows = tiny_pair
    curriculum = {"num_stages": 1, "epochs_per_stage": 12}
    optimizer = {"learning_rate": 1e-2}
    run = distill(
        write_config(tmp_path, None, student, rows, curriculum=curriculum, optimizer=optimizer), 2
    )
    steps = step_rows(run)
    assert all(row["loss"] == row["ce_loss"] and row["kd_ratio"] == 0 for row in steps)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_a_rank_that_applies_another_temperature_is_named_and_all_ranks_exit_71(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair)
    started = time.monotonic()
    rows = distill_with_stray(config, world_size=2, stray=1)
    assert time.monotonic() - started < 60
    for _, error in rows:
        assert error[0] == "WorkerError"
        assert "rank(s) 1" in error[1]


def test_a_stage_ends_early_when_the_dev_metric_stands_still(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    teacher, student, rows = tiny_pair
    # A learning rate of almost nothing: no gain is possible, so each stage ends
    # after `patience` looks.
    config = write_config(
        tmp_path, teacher, student, rows,
        data={"dev": str(rows), "dev_limit": 5},
        dev={"metric": "loss", "every": 1},
        curriculum={"num_stages": 2, "epochs_per_stage": 8, "ordering": "shuffled",
                    "advance": "converged", "patience": 2, "min_delta": 0.5},
        export={"select": "best_dev"},
    )  # fmt: skip
    run = distill(config, 2)
    stages = [row["stage"] for row in step_rows(run)]
    assert stages == [0, 0, 0, 1, 1, 1]
    dev = [row for row in read_json_lines(run.metrics) if row["kind"] == "dev"]
    best = min(dev, key=lambda row: row["value"])
    assert f"{best['step']} optimizer steps" in (run.export / "README.md").read_text()


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"micro_batch_size": 3, "global_batch_size": 8, "gradient_checkpointing": True}},
        {"engine": {"micro_batch_size": 3, "global_batch_size": 8, "offload_param": "cpu",
                    "offload_optimizer": "cpu"},
         "teacher": {"offload_param": "cpu"}},
        {"engine": {"micro_batch_size": 1, "global_batch_size": 8,
                    "zero_options": {"stage3_param_persistence_threshold": 0}}},
    ],
    ids=["gradient checkpointing", "offload", "nothing persistent"],
)  # fmt: skip
def test_how_it_is_computed_does_not_change_thelosses(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path, sections: dict
) -> None:
    run = distill(write_config(tmp_path, *tiny_pair, **sections), 2)
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_trains_near_fp32_and_resumes_exactly(
    tiny_pair: Pair, reference: RunDirectory, tmp_path: Path, zero_stage: int
) -> None:
    engine = {
        "micro_batch_size": 3,
        "global_batch_size": 8,
        "dtype": "bf16",
        "zero_stage": zero_stage,
    }
    whole = distill(write_config(tmp_path / "whole", *tiny_pair, engine=engine), 2)
    torch.testing.assert_close(losses(whole)[:, 0], losses(reference)[:, 0], rtol=0.05, atol=0.05)
    config = write_config(tmp_path / "parts", *tiny_pair, engine=engine)
    distill(config, 2, stop_after=4)
    run = distill(config, 2)
    assert without_speed(step_rows(run)) == without_speed(step_rows(whole))


def test_in_bf16_the_frequencies_of_rope_stay_fp32(tiny_pair: Pair, tmp_path: Path) -> None:
    engine = {"micro_batch_size": 3, "global_batch_size": 8, "dtype": "bf16"}
    dtypes = buffer_dtypes(write_config(tmp_path, *tiny_pair, engine=engine))
    assert any("inv_freq" in name for name in dtypes)
    assert set(dtypes.values()) == {"torch.float32"}
