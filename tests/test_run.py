"""The whole pipeline through the real command line, Ray and the deepspeed launcher."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pocl_dist.files import atomic_write_json, read_json
from pocl_dist.pipeline import verify_result
from pocl_dist.pipeline.manifest import write_manifest
from pocl_dist.pipeline.run_format import FILES
from pocl_dist.pipeline.verify import find_changes
from pocl_dist.trackers.registry import is_installed
from tests.test_trackers import READERS
from tests.tiny import write_config, write_rows

# Planted: none of them may be found again.
SECRETS = {
    name: f"canary-{name.lower()}-5f0c"
    for name in (
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
    )
}
ENVIRONMENT = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1"}


# Those that leave many small files are read back in test_trackers.py alone.
TRACKERS = [name for name in ("tensorboard", "wandb") if is_installed(name)]


def command_lines() -> bytes:
    """Returns the command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines.append(path.read_bytes())
    return b"\n".join(lines)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pocl_dist", *words]


def wait_for_steps(metrics: Path, num_steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not metrics.exists() or metrics.read_text().count('"kind": "step"') < num_steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no steps in time"
        time.sleep(0.1)


def steps(run_dir: Path) -> list[int]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def run_dir(tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run directory that was stopped by SIGTERM in the middle and then finished."""
    folder = tmp_path_factory.mktemp("whole")
    test_set = write_rows(folder / "test.jsonl", 6)
    config = write_config(
        folder,
        *tiny_pair,
        data={"eval": [str(test_set)], "dev": str(test_set)},
        curriculum={"num_stages": 2, "epochs_per_stage": 10, "ordering": "curriculum"},
        engine={"world_size": 2, "micro_batch_size": 4, "global_batch_size": 8},
        ray={"num_actors": 1},
        evaluate={"baselines": True},
        log={"trackers": TRACKERS, "every": 5},
    )
    words = command("run", str(config))
    first = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(folder / "run" / "metrics.jsonl", 3, first)
    (folder / "command_lines").write_bytes(command_lines())
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 75, output
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["retryable"]) == ("stopped", 75, True)
    assert subprocess.run(command("verify", str(folder / "run"))).returncode == 0
    num_before = len(steps(folder / "run"))
    words.append("--json")
    second = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resumed from {folder / 'run' / 'checkpoints'}" in second.stdout
    assert f"(step {num_before})" in second.stdout
    (folder / "output").write_text(output + second.stdout + second.stderr)
    (folder / "events").write_text(second.stdout)
    return folder / "run"


def test_planted_secrets_are_in_no_file_no_output_and_on_no_command_line(run_dir: Path) -> None:
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    assert b"pocl_dist" in (run_dir.parent / "command_lines").read_bytes()
    assert len(files) > 20
    hits = [
        f"{name} in {path}"
        for path in files
        for content in [path.read_bytes()]
        for name, secret in SECRETS.items()
        if secret.encode() in content
    ]
    assert hits == []


def test_a_stopped_run_goes_on_to_its_end_and_takes_every_step_once(run_dir: Path) -> None:
    plan = json.loads((run_dir / "plan.json").read_text())
    total = sum(stage["num_steps"] for stage in plan["stages"])
    assert steps(run_dir) == list(range(1, total + 1))


def test_json_lines_of_the_run_and_of_its_ranks_are_all_of_its_stdout(run_dir: Path) -> None:
    events = [json.loads(line) for line in (run_dir.parent / "events").read_text().splitlines()]
    assert events[-1]["event"] == "outcome" and events[-1]["exit_code"] == 0
    phases = [(e["phase"], e["number"], e["of"]) for e in events if e["event"] == "phase"]
    assert phases == [
        ("measure", 1, 5),
        ("plan", 2, 5),
        ("distill", 3, 5),
        ("evaluate", 4, 5),
        ("report", 5, 5),
    ]
    shown = {e["step"]: e for e in events if e["event"] == "step"}
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    logged = {row["step"]: row for row in rows if row["kind"] == "step"}
    assert shown and all(shown[step]["loss"] == logged[step]["loss"] for step in shown)
    last = shown[max(logged)]
    assert last["num_steps"] == max(logged) and last["eta_seconds"] == 0
    passes = [e for e in events if e["event"] == "rows"]
    assert passes[-1]["done"] == passes[-1]["total"]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_every_step_of_the_stopped_and_resumed_run_once(
    run_dir: Path, name: str
) -> None:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    expected = [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]
    found = READERS[name](run_dir / "trackers" / name)["step/loss"]
    assert [step for step, _ in found] == [step for step, _ in expected]
    values = [value for _, value in expected]
    assert [value for _, value in found] == pytest.approx(values, rel=1e-7)


def test_the_run_directory_holds_what_the_readme_promises(run_dir: Path) -> None:
    names = [
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "status.json",
        "manifest.json",
    ]
    assert all((run_dir / name).is_file() for name in names)
    assert (run_dir / "export" / "model.safetensors").is_file()
    report = json.loads((run_dir / "eval" / "test" / "report.json").read_text())
    assert set(report["baselines"]) == {"teacher", "student_before"}
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    kinds = {row["kind"]: row for row in rows}
    assert set(kinds) == {"step", "stage", "dev", "checkpoint"}
    assert not any("loss" in kinds[kind] for kind in ("stage", "dev", "checkpoint"))
    row = kinds["step"]
    promised = (
        "kind step stage epoch loss kd_loss ce_loss kl temperature kd_ratio learning_rate "
        "grad_norm num_tokens tokens_per_second padding_share peak_memory_bytes"
    )
    assert set(promised.split()) <= set(row)


def test_the_report_shows_the_share_of_time_of_measure_and_plan(run_dir: Path) -> None:
    time_used = json.loads((run_dir / "report.json").read_text())["time"]
    seconds = time_used["seconds"]
    expected = (seconds["measure"] + seconds["plan"]) / sum(seconds.values())
    assert time_used["measure_and_plan_share"] == pytest.approx(expected)
    assert {"measure", "plan", "distill", "evaluate"} <= set(seconds)


def test_a_finished_run_verifies_until_one_bit_of_any_of_its_files_changes(run_dir: Path) -> None:
    assert subprocess.run(command("verify", str(run_dir))).returncode == 0
    assert subprocess.run(command("outcome", str(run_dir)), capture_output=True).returncode == 0
    assert find_changes(run_dir) == []
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        content = path.read_bytes()
        position = random.Random(path.name).randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert path.relative_to(run_dir).as_posix() in "\n".join(find_changes(run_dir))
        path.write_bytes(content)


def test_a_finished_run_holds_only_documented_files_each_for_its_user_alone(run_dir: Path) -> None:
    for path in run_dir.rglob("*"):
        name = path.relative_to(run_dir).as_posix()
        if path.is_dir():
            assert path.stat().st_mode & 0o777 == 0o700, name
        else:
            assert any(fnmatch(name, pattern) for pattern in FILES), name
            assert path.stat().st_mode & 0o777 == 0o600, name
    assert not (run_dir / "lock").exists() and not (run_dir / "control" / "ranks").exists()


def _other_checkpoint_file(root: Path) -> None:
    file = sorted(root.glob("checkpoints/step-*/*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def _other_export(root: Path) -> None:
    weights = root / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def _better_report(root: Path) -> None:
    report = read_json(root / "eval" / "test" / "report.json")
    atomic_write_json(root / "eval" / "test" / "report.json", {**report, "rouge_l": 99.0})


def _other_record(name: str, key: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        atomic_write_json(root / name, {**read_json(root / name), key: "0" * 64})

    return change


SEALED_ANEW: dict[str, Callable[[Path], None]] = {
    "/rank-00001.safetensors: is not what checkpoints/step-": _other_checkpoint_file,
    "eval/test/report.json: is of another model than export/": _other_export,
    "report.json: is not about eval/test/report.json": _better_report,
    "export/pocl_dist.json: digest.student is": _other_record(
        "checkpoints/inputs.json", "digest.student"
    ),
    "checkpoints/inputs.json: digest.plan is not": _other_record(
        "checkpoints/inputs.json", "digest.plan"
    ),
    "checkpoints/inputs.json: digest.data is": _other_record(
        "checkpoints/inputs.json", "digest.data"
    ),
    "export/pocl_dist.json: was made from another plan.json": _other_record(
        "export/pocl_dist.json", "plan sha256"
    ),
    "eval/test/inputs-teacher.json: teacher model sha256 is": _other_record(
        "eval/test/inputs-teacher.json", "teacher model sha256"
    ),
}


@pytest.mark.parametrize("finding", SEALED_ANEW)
def test_a_change_of_a_finished_run_that_was_sealed_anew_breaks_the_chain(
    run_dir: Path, tmp_path: Path, finding: str
) -> None:
    root = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    SEALED_ANEW[finding](root)
    write_manifest(root)
    findings = find_changes(root)
    assert any(finding in line for line in findings), findings
    assert not any("sha256 differs" in line for line in findings)


def test_verify_knows_a_checkpoint_s_manifest_by_its_name() -> None:
    from pocl_dist.distributed import checkpoint

    assert verify_result.CHECKPOINT_MANIFEST == checkpoint.MANIFEST


def test_distill_also_works_under_torchrun(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair)
    assert subprocess.run(command("plan", str(config)), capture_output=True).returncode == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*torchrun, "-m", "pocl_dist", "distill", str(config)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path / "run")[-1] == 9
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert subprocess.run(command("verify", str(tmp_path / "run"))).returncode == 0


def rank_pids(run_dir: Path) -> list[int]:
    """Returns the process ids of the ranks of the latest start."""
    signs = sorted((run_dir / "control" / "ranks").glob("rank-*.json"))
    return [json.loads(path.read_text())["pid"] for path in signs]


def is_alive(pid: int) -> bool:
    """Returns whether the process runs; one that nobody has waited for yet does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def _export_tensors(run_dir: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(run_dir / "export" / "model.safetensors"))


def test_a_killed_rank_is_named_and_the_ranks_are_started_again_to_the_same_end(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    import torch

    sections = {
        "curriculum": {"num_stages": 2, "epochs_per_stage": 6, "ordering": "shuffled"},
        "engine": {"world_size": 2, "micro_batch_size": 4, "global_batch_size": 8},
        "checkpoint": {"every": 2},
    }
    killed = write_config(tmp_path / "killed", *tiny_pair, **sections)
    process = subprocess.Popen(
        command("run", "--max-restarts", "1", str(killed)),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run_dir = tmp_path / "killed" / "run"
    wait_for_steps(run_dir / "metrics.jsonl", 5, process)
    first, victim = rank_pids(run_dir)
    os.kill(victim, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert not any(map(is_alive, [first, victim, *rank_pids(run_dir)]))
    assert f"rank 1 (process {victim} on " in output
    assert "distill: restart 1 of 1, from step" in output
    assert subprocess.run(command("verify", str(run_dir))).returncode == 0
    calm = write_config(tmp_path / "calm", *tiny_pair, **sections)
    done = subprocess.run(command("run", str(calm)), env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0
    expected, found = _export_tensors(tmp_path / "calm" / "run"), _export_tensors(run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
