"""A signal in the middle of a long phase: all ranks leave with 75; the resumed run ends the same.

SIGTERM comes through a failpoint, in the process of one rank, at a named place.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pocl_dist.config import load_config
from pocl_dist.errors import StoppedError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.pipeline import run as whole_run
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest, waiting_request
from tests.ranks import start_ranks
from tests.tiny import write_config
from tests.training import checkpoint_tensors, step_rows

Pair = tuple[Path, Path, Path]


def _distill(path: str, failpoint: str) -> None:
    os.environ["POCL_FAILPOINT"] = failpoint
    from pocl_dist.pipeline import distill

    config = load_config([path])
    distill.distill_rank(config, RunDirectory(Path(config.run_dir)))


def _attempt(config: Path, failpoint: str) -> list[str | int | None]:
    """Returns how each rank ended: the class of its error, or what the process was killed by."""
    processes, results = start_ranks(_distill, 2, str(config), failpoint)
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    assert None not in codes, "a rank lives on"
    errors = dict(results.get(timeout=5)[::2] for code in codes if code == 0)
    return [errors[i][0] if code == 0 and errors[i] else code for i, code in enumerate(codes)]


def outcome(run: RunDirectory) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    """Returns step lines and dev lines without times, and all tensors of the last checkpoint."""
    timed = ("tokens_per_second", "peak_memory_bytes", "generation_seconds", "seconds")
    rows = [
        {key: value for key, value in row.items() if key not in timed}
        for row in read_json_lines(run.metrics)
        if row["kind"] in ("step", "dev")
    ]
    # The dev metric at a step comes before the checkpoint of it, or after it in a resumed run.
    return (
        [row for row in rows if row["kind"] == "step"],
        [row for row in rows if row["kind"] == "dev"],
        checkpoint_tensors(run),
    )


def assert_same(one: RunDirectory, other: RunDirectory) -> None:
    steps, dev, tensors = outcome(one)
    its_steps, its_dev, its_tensors = outcome(other)
    assert steps == its_steps
    assert dev == its_dev
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(value, its_tensors[name]) for name, value in tensors.items())


def sections_of(pair: Pair) -> dict[str, dict]:
    """Returns a run of 5 steps, all but the first on-policy, with four dev evaluations."""
    return {
        "data": {"dev": str(pair[2]), "dev_limit": 10},
        "dev": {"metric": "loss", "every": 2},
        "curriculum": {"num_stages": 2, "epochs_per_stage": 1, "ordering": "shuffled"},
        "generation": {"max_new_tokens": 4, "batch_size": 2},
        "policy": {"mode": "mixed", "on_policy_ratio": 0.85, "batch_size": 2},
    }


@pytest.fixture(scope="module")
def undisturbed(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    config = write_config(tmp_path_factory.mktemp("calm"), *tiny_pair, **sections_of(tiny_pair))
    loaded = load_config([config])
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    assert _attempt(config, "") == [0, 0]
    assert any(row["on_policy_share"] for row in step_rows(run))
    return run


# One rank alone is told, or killed: the other must learn of it. Five steps in two stages of two and
# three, dev metrics at 0, 2, 4 and 5 in three rounds each. The stages change at step 2.
TURNS = (
    # where, how both ranks end, which checkpoints are there, how many dev metrics are known
    ("loading=term%1", ["StoppedError"] * 2, [0], 0),
    ("evaluate.batch=term@2%1", ["StoppedError"] * 2, [0], 0),
    ("stage.before=kill@2%1", ["WorkerError", -signal.SIGKILL], [0, 2], 2),
    ("stage.after=kill%0", [-signal.SIGKILL, "WorkerError"], [0, 2], 2),
    ("generate.call=term@3%0", ["StoppedError"] * 2, [2, 3], 2),
    ("export.before=term%1", ["StoppedError"] * 2, [3, 5], 4),
)


@pytest.mark.parametrize(
    "turns",
    [TURNS[1:-1], pytest.param(TURNS, marks=pytest.mark.slow)],
    ids=["while training", "in every phase"],
)
def test_a_run_that_is_stopped_or_killed_at_every_turn_ends_like_an_undisturbed_one(
    tiny_pair: Pair, undisturbed: RunDirectory, tmp_path: Path, turns: Sequence[tuple]
) -> None:
    config = write_config(tmp_path, *tiny_pair, **sections_of(tiny_pair))
    loaded = load_config([config])
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    for failpoint, ends, checkpoints, num_dev in turns:
        assert _attempt(config, failpoint) == ends, failpoint
        dev = [row for row in read_json_lines(run.metrics) if row["kind"] == "dev"]
        assert (run.checkpoint_steps(), len(dev)) == (checkpoints, num_dev), failpoint
        assert not run.export.exists()
    assert _attempt(config, "") == [0, 0]
    assert (run.export / "model.safetensors").is_file()
    assert_same(run, undisturbed)


def test_the_status_tells_how_far_training_is_and_whose_job_it_is(
    undisturbed: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = read_json(undisturbed.status)
    assert (status["stage"], status["step"], status["num_steps"]) == (1, 5, 5)
    assert (status["last_checkpoint"], status["num_skipped"], status["num_overflows"]) == (5, 0, 0)
    assert not any("slurm" in key or "kubernetes" in key for key in status)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("HOSTNAME", "node-7")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    undisturbed.write_status("done", 0, "distill")  # what training said stays
    status = read_json(undisturbed.status)
    assert (status["step"], status["slurm_job_id"]) == (5, "123")
    assert status["slurm_restart_count"] == "2"
    assert "kubernetes_pod" not in status
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    fresh = RunDirectory(tmp_path)
    fresh.status.write_text("{torn")
    fresh.write_status("running", None, "plan")
    status = read_json(fresh.status)
    assert (status["kubernetes_pod"], status["step"], status["last_checkpoint"]) == (
        "node-7",
        None,
        None,
    )


def test_a_signal_during_one_step_of_a_run_ends_it_before_the_next(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are stand-ins; what is tested is what happens around and between them."""
    config = load_config([write_config(tmp_path, *tiny_pair)])
    run, taken = RunDirectory(Path(config.run_dir)), []

    def deaf(*_: object) -> None:  # like plan or report: it does not look
        taken.append("deaf")
        signal.raise_signal(signal.SIGTERM)

    def listening(*_: object) -> None:  # like a Ray pass whose last shard is done already
        taken.append("listening")
        with StopRequest(run, None).installed():
            signal.raise_signal(signal.SIGUSR1)

    before = signal.getsignal(signal.SIGTERM)
    for step in (deaf, listening):
        monkeypatch.setattr(whole_run, "steps_of", lambda _, s=step: [("one", s), ("two", deaf)])
        with pytest.raises(StoppedError, match="stopped before two"):
            whole_run.run_all(config, run)
        assert signal.getsignal(signal.SIGTERM) is before
    assert taken == ["deaf", "listening"]


def test_a_request_takes_over_what_the_one_before_it_got_since_its_last_look(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path)
    with StopRequest(run, None).installed() as outer:
        assert waiting_request() is outer
        signal.raise_signal(signal.SIGTERM)
        with StopRequest(run, None).installed() as inner:
            assert inner.is_asked()
    assert waiting_request() is not outer


def _signalled_twice(second: int) -> None:
    with StopRequest(RunDirectory(Path("nowhere")), None).installed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_the_same_signal_twice_ends_the_process_at_once(second: int, code: int) -> None:
    processes, _ = start_ranks(_signalled_twice, 1, second)
    processes[0].join(10)
    assert processes[0].exitcode == code
