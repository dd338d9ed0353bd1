"""launch/common/run_phase.sh ends with the code of the run, whatever the launcher gave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocl_dist.config.shipped import PACKAGE, launch_file
from pocl_dist.pipeline.run_directory import RunDirectory


def _start(root: Path, script: str) -> subprocess.Popen[str]:
    """Starts a step that is a shell script of the test's own."""
    command = ["bash", str(launch_file("common/run_phase.sh")), "distill", "config.yaml"]
    environment = {
        **os.environ,
        "RUN_DIR": str(root),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(PACKAGE.parent),
    }
    return subprocess.Popen(
        [*command, "bash", "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        # A shell cannot trap what was ignored when it started, as SIGHUP is below nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("script", "said", "code"),
    [
        ("exit 76", None, 76),  # its own code, whatever an earlier attempt has left
        ("exit 64", None, 64),
        ("cp told status.json; exit 1", ("failed", 78), 78),  # torchrun
        ("cp told status.json; exit 1", ("stopped", 75), 75),
        ("cp told status.json; exit 0", ("done", 0), 0),
        ("cp told status.json; exit 0", ("running", None), 71),  # srun after a lost node
        ("cp told status.json; exit 1", ("done", 0), 71),
        ("exit 0", None, 71),  # nothing new was said
        ("kill -9 $$", None, 71),
    ],
)
def test_the_code_is_that_of_the_run(
    tmp_path: Path, script: str, said: tuple[str, int | None] | None, code: int
) -> None:
    run = RunDirectory(tmp_path)
    run.write_status(*(said or ("done", 0)), "distill")
    run.status.rename(tmp_path / "told")
    run.write_status("done", 0, "plan", "of an earlier attempt")
    process = _start(tmp_path, script)
    _, words = process.communicate(timeout=60)
    assert process.returncode == code, words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_becomes_the_stop_file_and_the_step_ends_in_its_own_time(
    tmp_path: Path, number: int
) -> None:
    script = "touch ready; while ! [ -e control/stop ]; do sleep 0.05; done; sleep 0.3; exit 75"
    process = _start(tmp_path, script)
    ends_at = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert not (tmp_path / "control" / "stop").exists()
    assert process.stderr is not None
    process.stderr.close()
