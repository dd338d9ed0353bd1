"""A real comparison through the command line: stopped, gone on with, tabulated, verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_config, write_rows

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = (
    "--methods", "reverse_kl", "--seeds", "1", "--lr-grid", "1e-3,3e-3", "--ablate", "restarts",
    "--jobs", "2",
)  # fmt: skip
ARMS = ["sft", "seqkd", "reverse_kl-kd", "reverse_kl-pocl", "reverse_kl-kd-restarts"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pocl_dist", *words]


def num_trained(root: Path) -> int:
    return len(list((root / "runs").glob("*/*/*/export/model.safetensors")))


@pytest.fixture(scope="module")
def root(tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a comparison that was stopped while its first trainings ran, and then finished."""
    folder = tmp_path_factory.mktemp("compare")
    test_set = write_rows(folder / "test.jsonl", 6)
    path = write_config(
        folder,
        *tiny_pair,
        data={"eval": [str(test_set)], "dev": str(test_set)},
        curriculum={"num_stages": 2, "visits_per_example": 10, "ordering": "curriculum"},
        engine={"world_size": 1, "zero_stage": 0, "micro_batch_size": 8, "global_batch_size": 8},
        ray={"num_actors": 1},
        teacher={"source": "cache_hidden"},
    )
    words = command("compare", str(path), *WORDS)
    first = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 600
    while not list((folder / "run" / "runs").glob("*/*/*/metrics.jsonl")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "no training in time"
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=300)[0]
    assert first.returncode == 75, output
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert num_trained(folder / "run") < 10
    partial = json.loads((folder / "run" / "comparison.json").read_text())
    assert partial["is_complete"] is False and len(partial["marks"]) == len(ARMS)
    assert subprocess.run(command("verify", str(folder / "run"))).returncode == 0
    second = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    (folder / "run.out").write_text(second.stdout)
    return folder / "run"


def test_every_arm_has_its_figures_at_equal_visits(root: Path) -> None:
    value = json.loads((root / "comparison.json").read_text())
    assert "<html" in (root / "comparison.html").read_text()
    assert value["is_complete"] is True and value["marks"] == []
    assert [arm["name"] for arm in value["arms"]] == ARMS
    assert {arm["visits"] for arm in value["arms"]} == {240}
    assert num_trained(root) == 10
    for arm in value["arms"]:
        (run,) = arm["runs"]
        report = json.loads((root / run["run"] / "eval" / "test" / "report.json").read_text())
        assert arm["results"]["test"]["rouge_l"]["mean"] == pytest.approx(report["rouge_l"])
        devs = {c["learning_rate"]: c["dev"] for c in arm["learning_rate"]["candidates"]}
        assert devs[arm["learning_rate"]["chosen"]] == max(devs.values())
    assert set(value["baselines"]) == {"teacher", "student_before"}


def test_only_chosen_runs_were_asked_the_test_set(root: Path) -> None:
    value = json.loads((root / "comparison.json").read_text())
    asked = {
        path.parents[1].relative_to(root).as_posix() for path in root.glob("runs/*/*/*/eval/*")
    }
    assert asked == {arm["runs"][0]["run"] for arm in value["arms"]}


def test_the_restart_control_has_the_learning_rates_of_the_curriculum(root: Path) -> None:
    value = json.loads((root / "comparison.json").read_text())
    grid = {arm["name"]: arm for arm in value["arms"]}
    rates = {}
    for name in ("reverse_kl-kd-restarts", "reverse_kl-pocl"):
        folder = root / "runs" / name / "lr-0.003" / "seed-1"
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        rates[name] = [row["learning_rate"] for row in rows if row["kind"] == "step"]
    assert rates["reverse_kl-kd-restarts"] == rates["reverse_kl-pocl"]
    (restart,) = grid["reverse_kl-kd-restarts"]["keys"]["optimizer.restart_steps"]
    assert rates["reverse_kl-pocl"][restart] == 0.003 > rates["reverse_kl-pocl"][restart - 1]


def test_difficulty_answers_and_cache_were_made_once(root: Path) -> None:
    shared = (root / "shared" / "difficulty").glob("shard-*.parquet")
    (shard,) = list(shared)
    users = list(root.glob(f"runs/*/*/*/difficulty/{shard.name}"))
    assert len(users) == 2 and all(path.samefile(shard) for path in users)
    heads = list(root.glob("runs/*/*/*/teacher_cache/head.safetensors"))
    assert len(heads) == 6  # plain KD, POCL and the control, two rates each
    head = root / "shared" / "teacher_cache" / "head.safetensors"
    assert all(path.samefile(head) for path in heads)
    timings = [json.loads(path.read_text()) for path in root.glob("runs/*/*/*/timings.json")]
    assert all(found.get("measure", 0.0) < 5.0 for found in timings)


def test_the_whole_comparison_verifies_and_does_nothing_a_second_time(root: Path) -> None:
    assert subprocess.run(command("verify", str(root))).returncode == 0
    before = (root / "comparison.json").read_bytes()
    config = root.parent / "config.yaml"
    again = subprocess.run(
        command("compare", str(config), *WORDS), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "── 1/" not in again.stdout
    assert (root / "comparison.json").read_bytes() == before
    assert subprocess.run(command("verify", str(root))).returncode == 0
