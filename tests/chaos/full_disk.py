"""A 64 MiB tmpfs as run directory that fills up, and ENOSPC at every atomic write in turn (T5)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pocl_dist.failpoints import VARIABLE
from pocl_dist.files import free_bytes
from tests.chaos.compare import differences, verify_problem
from tests.chaos.lab import Lab
from tests.chaos.result import Result

TMPFS_BYTES = 64 << 20
LEFT_FREE = 48 << 10  # less than a checkpoint
MOST_WRITES = 20


@contextmanager
def _tmpfs(place: Path) -> Iterator[Path]:
    options = ["-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs"]
    subprocess.run(["mount", *options, str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, capture_output=True)


def _fill(folder: Path, ballast: Path) -> None:
    with ballast.open("ab") as stream:
        while (room := free_bytes(folder) - LEFT_FREE) > 0:
            stream.write(b"\0" * min(room, 1 << 20))
            stream.flush()


def _fill_when_saved(lab: Lab, config: Path, run_dir: Path, ballast: Path, step: int) -> tuple:
    def disturb(processes: list) -> float | None:
        while all(process.is_alive() for process in processes):
            if any(int(p.name[5:]) >= step for p in run_dir.glob("checkpoints/step-*")):
                _fill(run_dir, ballast)
                return time.monotonic()
            time.sleep(0.01)
        return None

    outcome = lab.train(config, disturb=disturb)
    messages = [message for name, message in outcome.errors if name == "StorageError"]
    return outcome, messages


def _tmpfs_trial(lab: Lab, folder: Path, step: int, result: Result) -> None:
    """Fills the disk once a checkpoint is there, frees it, goes on."""
    ballast = folder / "ballast"
    with _tmpfs(folder):
        config = lab.training_config(folder)
        run_dir = folder / "run"
        outcome, messages = _fill_when_saved(lab, config, run_dir, ballast, step)
        problem = "" if len(messages) == 2 else f"not 74 on both ranks: {outcome}"
        if not all("bytes" in message and "free" in message for message in messages):
            problem += f"; no needed and free bytes in {messages}"
        if list(run_dir.glob("checkpoints/.tmp-*")):
            problem += "; a half-written checkpoint was left"
        result.took(outcome.seconds)
        saved = sorted(run_dir.glob("checkpoints/step-*"))
        ballast.unlink()
        again = lab.train(config)
        if not again.is_done or not saved:
            problem += f"; did not go on: {again}"
        result.count(f"disk full after step {step}: {problem}" if problem else "")
        result.compare(differences(lab.trained(), run_dir), f"tmpfs, step {step}")
        if problem:
            shutil.copytree(run_dir, lab.place("kept-tmpfs") / "run")


def _plan(config: Path, entry: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({VARIABLE: entry} if entry else {})}
    command = [sys.executable, "-m", "pocl_dist", "plan", str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _enospc_trials(lab: Lab, result: Result) -> None:
    """Lets the N-th atomic write of `plan` meet a full disk, at its start or before its rename."""
    config = lab.training_config(lab.place("calm-plan"))
    assert _plan(config).returncode == 0
    expected = {"plan": _plan_digest(config)}
    for place in ("atomic_write.open", "atomic_write.before_rename"):
        for nth in range(1, lab.count(MOST_WRITES) + 1):
            config = lab.training_config(lab.place("enospc"))
            (config.parent / "run" / "plan.json").unlink()
            done = _plan(config, f"{place}=enospc@{nth}")
            if done.returncode == 0:  # all writes are through
                break
            said = done.stderr.strip()
            problem = "" if done.returncode == 74 else f"exit code {done.returncode}: {said[-300:]}"
            if "bytes free" not in said or "Traceback" in said:
                problem += f"; message: {said[-300:]}"
            half = [str(p) for p in (config.parent / "run").rglob(".tmp-*")]
            problem += f"; left: {half}" if half else ""
            again = _plan(config)
            problem += "" if again.returncode == 0 else f"; then {again.returncode}: {again.stderr}"
            problem += verify_problem(config.parent / "run")
            result.count(f"{place}, write {nth}: {problem}" if problem else "")
            result.compare([] if expected["plan"] == _plan_digest(config) else ["plan"], place)


def _plan_digest(config: Path) -> str:
    from tests.chaos.compare import fingerprint

    return fingerprint(config.parent / "run").get("plan", "none")


def run(lab: Lab) -> Result:
    """Both kinds of full disk; the tmpfs needs root."""
    result = lab.result("disk full: a 64 MiB tmpfs in training; ENOSPC at each write of a step")
    lab.trained()
    if os.geteuid() == 0:
        generator = lab.random("full_disk")
        for turn in range(lab.count(3)):
            step = 2 * generator.randint(1, 9)
            _tmpfs_trial(lab, lab.place(f"tmpfs-{turn}"), step, result)
    else:
        result.notes.append("SKIPPED: the tmpfs, which only root can mount")
        print("full_disk: SKIPPED the tmpfs: only root can mount one", flush=True)
    _enospc_trials(lab, result)
    return result
