"""Killed, out of disk, on other ranks, with dropout: a run that goes on ends as if nothing was."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pocl_dist.curriculum.coordinator import Progress
from pocl_dist.distributed.checkpoint import MANIFEST, committed_steps, damage_of
from pocl_dist.errors import StorageError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.tiny import write_config
from tests.training import (
    checkpoint_tensors,
    distill,
    distill_killed,
    distill_with_errors,
    losses,
    step_rows,
    without_speed,
)

Pair = tuple[Path, Path, Path]
SAVES = {"every": 2, "keep_last": 100}


def _assert_same(run: RunDirectory, whole: RunDirectory) -> None:
    assert without_speed(step_rows(run)) == without_speed(step_rows(whole))
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.fixture(scope="module")
def whole(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns an undisturbed run on two ranks that saves every other step."""
    return distill(write_config(tmp_path_factory.mktemp("whole"), *tiny_pair, checkpoint=SAVES), 2)


PLACES = [
    "checkpoint.before_write", "checkpoint.after_write", "checkpoint.before_manifest",
    "checkpoint.before_rename", "checkpoint.after_rename", "checkpoint.before_prune",
]  # fmt: skip
FAST = [("checkpoint.before_rename=kill@2%0", True)]
SLOW = [
    (f"{place}=kill@3%{rank}", is_asynchronous)
    for place in PLACES
    for rank in ((0, 1) if place.endswith("_write") else (0,))
    for is_asynchronous in (False, True)
]


@pytest.mark.parametrize(
    ("place", "is_asynchronous"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_a_run_killed_inside_a_save_resumes_and_ends_as_the_undisturbed_one(
    tiny_pair: Pair, whole: RunDirectory, tmp_path: Path, place: str, is_asynchronous: bool
) -> None:
    checkpoint = {**SAVES, "asynchronous": is_asynchronous}
    config = write_config(tmp_path, *tiny_pair, checkpoint=checkpoint)
    run = distill_killed(config, 2, place)
    is_committed = "after_rename" in place or "prune" in place
    num_saved = int(place.split("@")[1][0]) - (not is_committed)
    assert len(committed_steps(run.checkpoints)) == num_saved
    distill(config, 2)
    _assert_same(run, whole)
    assert not list(run.checkpoints.glob(".tmp-*"))
    assert not list(run.checkpoints.glob("bad-*"))
    rows = [row for row in read_json_lines(run.metrics) if row["kind"] == "checkpoint"]
    assert rows[-1]["step"] == committed_steps(run.checkpoints)[-1]
    assert all(row["is_asynchronous"] == is_asynchronous for row in rows)


@pytest.mark.slow
def test_asynchronous_saves_are_the_same_and_say_how_long_training_stood_still(
    tiny_pair: Pair, whole: RunDirectory, tmp_path: Path
) -> None:
    checkpoint = {**SAVES, "asynchronous": True}
    run = distill(write_config(tmp_path, *tiny_pair, checkpoint=checkpoint), 2)
    _assert_same(run, whole)
    assert committed_steps(run.checkpoints) == committed_steps(whole.checkpoints)
    rows = [row for row in read_json_lines(run.metrics) if row["kind"] == "checkpoint"]
    assert [row["step"] for row in rows] == committed_steps(run.checkpoints)
    assert all(row["is_asynchronous"] and row["pause_seconds"] > 0 for row in rows)
    sync = [row for row in read_json_lines(whole.metrics) if row["kind"] == "checkpoint"]
    assert all(row["pause_seconds"] == row["seconds"] for row in sync)


@pytest.mark.parametrize("is_asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_under_one_rank_stops_all_with_74_and_the_checkpoint_before_is_intact(
    tiny_pair: Pair, tmp_path: Path, is_asynchronous: bool
) -> None:
    checkpoint = {**SAVES, "asynchronous": is_asynchronous}
    config = write_config(tmp_path, *tiny_pair, checkpoint=checkpoint)
    run, ends = distill_with_errors(config, 2, "checkpoint.before_write=enospc@2%1")
    assert [error[0] for _, error in ends] == [StorageError.__name__] * 2
    assert all("checkpoint needs " in error[1] and "disk full" in error[1] for _, error in ends)
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == ["step-00000002"]
    newest = run.checkpoints / "step-00000002"
    assert damage_of(newest, str(read_json(newest / MANIFEST)["digests"]["run"])) == ""


@pytest.mark.slow
def test_a_run_killed_inside_the_export_leaves_none_and_exports_the_same_when_it_goes_on(
    tiny_pair: Pair, whole: RunDirectory, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair)
    run = distill_killed(config, 2, "export.before_rename=kill%0")
    assert not run.export.exists()
    distill(config, 2)
    mine, theirs = (
        {path.name: path.read_bytes() for path in r.export.iterdir()} for r in (run, whole)
    )
    assert mine.keys() == theirs.keys()
    assert mine["model.safetensors"] == theirs["model.safetensors"]


def test_the_manifest_says_what_it_was_made_from_and_all_that_the_next_decision_depends_on(
    whole: RunDirectory,
) -> None:
    newest = sorted(whole.checkpoints.glob("step-*"))[-1]
    manifest = read_json(newest / MANIFEST)
    inputs = read_json(whole.checkpoints / "inputs.json")
    assert manifest["digests"]["data"] == inputs["digest.data"]
    assert {"run", "config", "plan", "student", "teacher", "tokenizer"} <= set(manifest["digests"])
    assert set(manifest["state"]) == {field.name for field in fields(Progress)}
    assert manifest["state"]["step"] == manifest["step"] == step_rows(whole)[-1]["step"]
    names = {"pocl_dist", "python", "torch", "deepspeed", "transformers", "safetensors"}
    assert names == set(manifest["versions"])
    assert (manifest["world_size"], manifest["attempt"], manifest["stage"]) == (2, 1, 1)
    assert manifest["bytes"] == sum(row["bytes"] for row in manifest["files"])
    kinds = {name.split(".")[0] for name in checkpoint_tensors(whole)}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq"}


def test_with_dropout_a_resumed_run_draws_the_same_masks(
    tiny_pair: Pair, whole: RunDirectory, tmp_path: Path
) -> None:
    import shutil

    teacher, plain, rows = tiny_pair
    student = tmp_path / "student"
    shutil.copytree(plain, student)
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.3}))
    dropped = distill(write_config(tmp_path / "whole", teacher, student, rows), 1)
    config = write_config(tmp_path / "parts", teacher, student, rows)
    distill(config, 1, stop_after=5)
    _assert_same(distill(config, 1), dropped)
    assert not torch.allclose(losses(dropped)[0], losses(whole)[0], rtol=1e-3)  # there was dropout


def test_a_run_that_goes_on_with_fewer_and_with_more_ranks_takes_the_same_steps(
    tiny_pair: Pair, whole: RunDirectory, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair)
    distill(config, 2, stop_after=2)
    distill(config, 1, stop_after=4)
    _assert_same_steps(distill(config, 4), whole)


def _assert_same_steps(run: RunDirectory, whole: RunDirectory) -> None:
    torch.testing.assert_close(losses(run), losses(whole), rtol=1e-5, atol=1e-9)
    # The same examples in each step: as many label tokens, of the same epoch.
    for mine, theirs in zip(step_rows(run), step_rows(whole), strict=True):
        assert all(mine[key] == theirs[key] for key in ("num_tokens", "epoch", "stage"))


LONG = {"curriculum": {"num_stages": 2, "epochs_per_stage": 5, "ordering": "shuffled"}}


@pytest.fixture(scope="module")
def long_run(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns an uninterrupted run of 23 steps on two ranks; its first stage ends after 8."""
    return distill(write_config(tmp_path_factory.mktemp("long"), *tiny_pair, **LONG), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_on_another_number_of_ranks_the_next_20_losses_are_the_same(
    tiny_pair: Pair, long_run: RunDirectory, tmp_path: Path, before: int, after: int
) -> None:
    config = write_config(tmp_path, *tiny_pair, **LONG)
    distill(config, before, stop_after=3)
    run = distill(config, after)
    assert len(step_rows(run)) == 23
    _assert_same_steps(run, long_run)
