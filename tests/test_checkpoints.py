"""When checkpoints are written, which are kept, and what a damaged one or a newer attempt does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.run_directory import ATTEMPT_VARIABLE, RunDirectory
from pocl_dist.pipeline.stop_request import STARTED_VARIABLE, StopRequest
from tests.tiny import write_config
from tests.training import checkpoint_tensors, distill, distill_ended, step_rows

Pair = tuple[Path, Path, Path]
SECTIONS = {"curriculum": {"num_stages": 2, "epochs_per_stage": 2, "ordering": "shuffled"}}


def _steps_saved(run: RunDirectory) -> list[int]:
    return [row["step"] for row in read_json_lines(run.metrics) if row["kind"] == "checkpoint"]


def _folders(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def finished(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns a run that saved after every step and kept all."""
    config = write_config(
        tmp_path_factory.mktemp("finished"),
        *tiny_pair,
        checkpoint={"every": 1, "keep_last": 100},
        **SECTIONS,
    )
    return distill(config, 1)


def test_minutes_between_checkpoints_count_from_the_last_one(
    tiny_pair: Pair, tmp_path: Path, finished: RunDirectory
) -> None:
    config = write_config(tmp_path, *tiny_pair, checkpoint={"every_minutes": 1e-6}, **SECTIONS)
    run = distill(config, 1)
    num_steps = len(step_rows(run))
    assert set(_steps_saved(run)) >= set(range(1, num_steps + 1))
    seldom = write_config(
        tmp_path / "seldom", *tiny_pair, checkpoint={"every_minutes": 1e6}, **SECTIONS
    )
    assert len(_steps_saved(distill(seldom, 1))) == 2  # the stage ends
    assert step_rows(run)[-1]["loss"] == step_rows(finished)[-1]["loss"]


def test_stage_ends_are_kept_beside_the_newest_when_asked(tiny_pair: Pair, tmp_path: Path) -> None:
    checkpoint = {"every": 1, "keep_last": 1, "keep_stage_ends": True}
    run = distill(write_config(tmp_path, *tiny_pair, checkpoint=checkpoint, **SECTIONS), 1)
    stages = [row for row in read_json_lines(run.metrics) if row["kind"] == "stage"]
    first_of_second_stage, last = stages[1]["step"], step_rows(run)[-1]["step"]
    assert _folders(run) == [f"step-{first_of_second_stage - 1:08d}", f"step-{last:08d}"]


def _damaged_copy(finished: RunDirectory, folder: Path, step: int) -> tuple[RunDirectory, Path]:
    """Returns a copy that stands at `step`, unfinished, with one bit of its weights flipped."""
    import shutil

    run = RunDirectory(folder / "run")
    shutil.copytree(finished.root, run.root)
    shutil.rmtree(run.export)
    for path in sorted(run.checkpoints.glob("step-*"))[step:]:
        shutil.rmtree(path)
    file = next(sorted(run.checkpoints.glob("step-*"))[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    return run, file


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_ends_the_same(
    tiny_pair: Pair, tmp_path: Path, finished: RunDirectory
) -> None:
    run, file = _damaged_copy(finished, tmp_path, 4)
    checkpoint = {"every": 1, "keep_last": 100}
    distill(write_config(tmp_path, *tiny_pair, checkpoint=checkpoint, **SECTIONS), 1)
    assert (run.checkpoints / f"bad-{file.parent.name}").is_dir()
    expected, found = checkpoint_tensors(finished), checkpoint_tensors(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_with_on_damage_fail_a_damaged_checkpoint_stops_the_run_and_stays_where_it_is(
    tiny_pair: Pair, tmp_path: Path, finished: RunDirectory
) -> None:
    _, file = _damaged_copy(finished, tmp_path, 4)
    config = write_config(tmp_path, *tiny_pair, resume={"on_damage": "fail"}, **SECTIONS)
    with pytest.raises(AssertionError, match=r"MismatchError.*sha256 differs"):
        distill(config, 1)
    assert file.exists()


def test_an_attempt_that_lost_the_run_directory_ends_with_71_and_commits_nothing(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair, **SECTIONS)
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    (run.root / "lock").write_text(json.dumps({"attempt": 2, "host": "h", "pid": 1}))
    assert distill_ended(config, 1, {ATTEMPT_VARIABLE: "1"}) == [71]
    assert not list(run.checkpoints.glob("step-*"))


def test_the_time_limit_counts_from_the_start_of_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    run = RunDirectory(tmp_path)
    monkeypatch.delenv(STARTED_VARIABLE, raising=False)
    assert not StopRequest(run, 1.0).is_asked()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = time.clock_gettime(time.CLOCK_BOOTTIME) - 61.0
    monkeypatch.setitem(os.environ, STARTED_VARIABLE, f"{boot_id} {started!r}")
    assert StopRequest(run, 1.0).is_asked()
    assert not StopRequest(run, 2.0).is_asked()
    assert not StopRequest(run, None).is_asked()
    # A launcher handed it to another machine, whose clock began elsewhere.
    monkeypatch.setitem(os.environ, STARTED_VARIABLE, f"another-boot {started!r}")
    assert not StopRequest(run, 1.0).is_asked()
