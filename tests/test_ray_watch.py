"""A daemon of Ray that dies is noticed at once; Ray itself would wait a minute and exit with 1."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_dist.distributed import ray_watch
from pocl_dist.distributed.ray_watch import DaemonWatch


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a child of this process that is called as Ray's daemon is."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, tmp_path / "raylet")
    process = subprocess.Popen([tmp_path / "raylet", "60"])
    yield process
    process.kill()
    process.wait()


def _wait_for(reasons: list[str], seconds: float) -> list[str]:
    ends = time.monotonic() + seconds
    while not reasons and time.monotonic() < ends:
        time.sleep(0.02)
    return reasons


def test_a_daemon_that_is_killed_is_named_within_seconds(
    daemon: subprocess.Popen[bytes],
) -> None:
    reasons: list[str] = []
    with DaemonWatch(None, reasons.append):
        time.sleep(ray_watch.POLL_SECONDS + 0.3)
        assert reasons == []
        daemon.kill()
        assert _wait_for(reasons, 5) == [f"Ray's raylet (process {daemon.pid}) has ended"]
    assert len(reasons) == 1


def test_a_start_that_fails_by_itself_says_why_and_a_session_that_was_up_gets_a_last_look(
    daemon: subprocess.Popen[bytes],
) -> None:
    reasons: list[str] = []
    with DaemonWatch(None, reasons.append):  # as when Ray gives up its start
        time.sleep(ray_watch.POLL_SECONDS + 0.3)
        daemon.kill()
    assert reasons == []
    with DaemonWatch(None, reasons.append) as watch:
        watch._look()
        watch.is_up = True
    assert reasons == [], "there is no daemon that was seen alive"


def test_a_head_elsewhere_is_lost_when_it_refuses_several_times_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_watch, "CLUSTER_POLL_SECONDS", 0.05)
    monkeypatch.setattr(ray_watch, "PATIENCE_SECONDS", 0.0)
    reasons: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with DaemonWatch(address, reasons.append):
            time.sleep(0.5)
            assert reasons == []
            head.close()
            (reason,) = _wait_for(reasons, 5)
    assert reason.startswith(f"the head of the Ray cluster at {address} is lost: ")
