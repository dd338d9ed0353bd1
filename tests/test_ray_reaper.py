"""What a killed driver leaves of its private Ray is ended, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pocl_dist.distributed import ray_reaper

_HOLDER = "import sys, time; kept = open(sys.argv[1], 'w'); print('up', flush=True); time.sleep(60)"


def _holder(path: Path) -> subprocess.Popen[str]:
    """Starts a process that keeps a file open, as a Ray daemon does its log."""
    command = [sys.executable, "-I", "-S", "-c", _HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_when_the_driver_is_gone_its_daemons_end_and_the_folder_goes(tmp_path: Path) -> None:
    folder, other = tmp_path / "pocl-a", tmp_path / "pocl-ab"
    folder.mkdir()
    other.mkdir()
    daemon, stranger = _holder(folder / "log"), _holder(other / "log")
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", ray_reaper.__file__, str(folder)], stdin=subprocess.PIPE
    )
    try:
        time.sleep(0.3)
        assert daemon.poll() is None, "the driver lives: nothing is to be ended"
        assert reaper.stdin is not None
        reaper.stdin.close()  # what the kernel does for a driver that was killed
        assert daemon.wait(10) == -9
        assert reaper.wait(10) == 0
        assert not folder.exists()
        assert stranger.poll() is None and other.exists()
    finally:
        for process in (daemon, stranger, reaper):
            process.kill()
            process.wait()
