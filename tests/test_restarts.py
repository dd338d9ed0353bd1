"""The supervisor of the ranks, with launchers that die: how often it starts them, who is left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pocl_dist.config import load_config
from pocl_dist.errors import WorkerError
from pocl_dist.pipeline import launch_local
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.tiny import write_config, write_llama, write_rows


def _supervise(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> RunDirectory:
    """Runs ranks by a launcher of the test's own, five restarts allowed; returns the directory."""
    student = write_llama(folder / "student", hidden=16, layers=1, seed=0)
    rows = write_rows(folder / "rows.jsonl", 8)
    path = write_config(folder, None, student, rows, run={"max_restarts": 5})
    launcher = folder / "launcher.sh"
    launcher.write_text(script)
    monkeypatch.setattr(launch_local, "launch_file", lambda _: launcher)
    config = load_config([path])
    run = RunDirectory(Path(config.run_dir))
    run.write_status("running", None, "distill")
    with pytest.raises(WorkerError) as caught:
        launch_local.run_ranks(config, run)
    assert caught.value.exit_code == 71
    (folder / "said.txt").write_text(str(caught.value))
    return run


def test_three_starts_that_save_nothing_new_are_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _supervise(tmp_path, monkeypatch, 'echo x >> "$(dirname "$1")/starts"; kill -9 $$')
    assert (run.root / "starts").read_text().split() == ["x"] * 3
    assert "3 starts in a row have saved nothing new" in (tmp_path / "said.txt").read_text()


def test_starts_that_get_on_go_on_to_the_number_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
    run=$(dirname "$1"); echo x >> "$run/starts"
    mkdir -p "$run/checkpoints/step-$(wc -l < "$run/starts")"; exit 1"""
    run = _supervise(tmp_path, monkeypatch, script)
    assert (run.root / "starts").read_text().split() == ["x"] * 6


def test_what_a_dead_launcher_leaves_behind_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rank that is deaf to SIGTERM, as one that hangs in a collective.
    script = """
    (trap '' TERM; while :; do sleep 0.1; done) & echo $! >> "$(dirname "$1")/pids"
    kill -9 $$"""
    run = _supervise(tmp_path, monkeypatch, script)
    pids = [int(word) for word in (run.root / "pids").read_text().split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 5
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
