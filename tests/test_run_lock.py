"""The lock of a run directory: one writer, a lease, and a fence for one that wakes up too late."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pocl_dist.config import load_config
from pocl_dist.errors import BusyError, StorageError, WorkerError
from pocl_dist.files import atomic_write_text
from pocl_dist.pipeline import run_lock as module
from pocl_dist.pipeline.manifest import write_manifest
from pocl_dist.pipeline.run_directory import ATTEMPT_VARIABLE, RunDirectory
from pocl_dist.pipeline.run_lock import (
    LEASE_SECONDS,
    abandonment,
    check_not_fenced,
    is_locked,
    run_lock,
)
from pocl_dist.pipeline.run_step import run_step
from pocl_dist.pipeline.status_file import read_status


def test_the_lock_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with run_lock(root):
        held = json.loads((root / "lock").read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
    assert not (root / "lock").exists()
    with pytest.raises(StorageError), run_lock(root):
        raise StorageError("disk full")
    assert not (root / "lock").exists()


def test_a_second_run_is_refused_with_the_holder_and_does_not_take_the_lock(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(BusyError, match=f"in use by process {os.getpid()}"), run_lock(tmp_path):
            pytest.fail("two runs hold the lock")
        assert (tmp_path / "lock").exists()


def _write_lock(root: Path, seconds_ago: float = 0.0, **holder: object) -> Path:
    root.mkdir(exist_ok=True)
    path = root / "lock"
    path.write_text(json.dumps(holder))
    touched = time.time() - seconds_ago
    os.utime(path, (touched, touched))
    return path


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = "from pocl_dist.pipeline.run_lock import _take; import sys, pathlib; "
    code += "_take(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert json.loads((tmp_path / "lock").read_text())["attempt"] == 1
    with run_lock(tmp_path) as attempt:
        held = json.loads((tmp_path / "lock").read_text())
        assert (attempt, held["attempt"], held["pid"]) == (2, 2, os.getpid())


def test_another_process_that_got_the_number_of_a_dead_holder_does_not_count(
    tmp_path: Path,
) -> None:
    _write_lock(tmp_path, place=module._place(), pid=os.getpid(), started_at="1", attempt=4)
    with run_lock(tmp_path) as attempt:
        assert attempt == 5


FOREIGN = {"host": "elsewhere", "pid": 1, "since": "today", "place": "elsewhere boot", "attempt": 3}


@pytest.mark.parametrize("content", [json.dumps(FOREIGN), "", "{", '{"pid": "x"}', "[]"])
def test_a_lock_that_cannot_be_judged_from_here_is_kept_while_its_lease_lasts(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with pytest.raises(BusyError, match="ends by itself 30 s after"), run_lock(tmp_path):
        pytest.fail("the lock was taken")
    assert path.read_text() == content
    late = path.stat().st_mtime - LEASE_SECONDS - 1
    os.utime(path, (late, late))
    with run_lock(tmp_path) as attempt:
        assert attempt == (4 if content == json.dumps(FOREIGN) else 1)


def test_the_lease_is_renewed_while_the_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.02)
    with run_lock(tmp_path):
        path = tmp_path / "lock"
        os.utime(path, (1.0, 1.0))
        ends = time.monotonic() + 5
        while path.stat().st_mtime == 1.0 and time.monotonic() < ends:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1.0


def test_a_writer_that_was_thought_dead_may_not_commit_and_leaves_the_new_lock(
    tmp_path: Path,
) -> None:
    with run_lock(tmp_path):
        check_not_fenced(tmp_path)
        _write_lock(tmp_path, **(FOREIGN | {"attempt": 2}))
        with pytest.raises(WorkerError, match="this is attempt 1, and attempt 2 has it"):
            check_not_fenced(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["attempt"] == 2
    assert is_locked(tmp_path)


def test_attempts_are_counted_over_runs_that_ended_well(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"attempt": 7}))
    with run_lock(tmp_path) as attempt:
        assert attempt == 8


def test_two_processes_that_start_at_once_do_not_both_get_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from pocl_dist.errors import BusyError\n"
        "from pocl_dist.pipeline.run_lock import run_lock\n"
        "try:\n    with run_lock(Path(sys.argv[1])):\n        print('held', flush=True)\n"
        "        sys.stdin.read()\nexcept BusyError:\n    print('busy', flush=True)\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    said = sorted(str(process.stdout.readline()).strip() for process in both if process.stdout)
    for process in both:
        process.communicate("")
    assert said == ["busy", "held"]


def test_an_attempt_is_abandoned_when_its_holder_dies_or_another_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)
    assert abandonment(tmp_path) == ""
    with run_lock(tmp_path) as attempt:
        assert abandonment(tmp_path) == ""
        _write_lock(tmp_path, place=module._place(), pid=1, started_at="no such", attempt=attempt)
        assert abandonment(tmp_path) == (
            f"process 1, which holds {tmp_path} for attempt {attempt}, is gone"
        )
        _write_lock(tmp_path, **(FOREIGN | {"attempt": attempt + 1}))
        assert "no longer held by attempt" in abandonment(tmp_path)
        (tmp_path / "lock").unlink()
        assert "no longer held by attempt" in abandonment(tmp_path)


@pytest.mark.parametrize("is_refreshed", [False, True])
def test_a_lock_from_the_future_is_judged_by_whether_it_is_touched_not_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_refreshed: bool
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.1)
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.3)
    path = _write_lock(tmp_path, seconds_ago=-86400.0, **FOREIGN)
    is_over = threading.Event()

    def touch() -> None:  # a holder whose file server was set back by a day, and goes on being late
        while is_refreshed and not is_over.wait(0.05):
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))

    keeper = threading.Thread(target=touch)
    keeper.start()
    try:
        if is_refreshed:
            with pytest.raises(BusyError), run_lock(tmp_path):
                pytest.fail("the lock was taken")
        else:
            with run_lock(tmp_path) as attempt:
                assert attempt == 4
    finally:
        is_over.set()
        keeper.join()
    assert path.exists() == is_refreshed


def test_a_wall_clock_that_is_set_back_breaks_neither_lock_nor_time_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.02)
    days = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 86400.0 * next(days))
    monkeypatch.setattr(time, "time_ns", lambda: 10**18 - 10**14 * next(days))
    run = RunDirectory(tmp_path)
    config = load_config(["tiny_cpu.yaml"], [f"run_dir={tmp_path}"])
    with run_lock(tmp_path):
        run_step("plan", lambda *_: time.sleep(0.05), config, run)
        check_not_fenced(tmp_path)
        with pytest.raises(BusyError), run_lock(tmp_path):
            pytest.fail("the lock was taken")
    assert 0.05 <= json.loads(run.timings.read_text())["plan"] < 5


def test_a_writer_that_was_thought_dead_writes_no_file_of_the_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run_lock(tmp_path):
        run.write_status("running", None, "plan")
        _write_lock(tmp_path, **(FOREIGN | {"attempt": 2}))
        for write in (
            lambda: run.write_status("failed", 70, "plan"),
            lambda: write_manifest(tmp_path),
            lambda: atomic_write_text(run.plan, "{}"),
            lambda: run.add_seconds("plan", 1.0),
        ):
            with pytest.raises(WorkerError, match="attempt 2 has it"):
                write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "status.json"]
    assert read_status(run.status)["state"] == "running"
