"""A 64 MiB tmpfs as run directory that fills up in the middle of training (T5)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pocl_dist.files import free_bytes
from tests.chaos.compare import differences
from tests.chaos.lab import Lab
from tests.chaos.result import Result

TMPFS_BYTES = 64 << 20
LEFT_FREE = 48 << 10  # less than a checkpoint


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


def run(lab: Lab) -> Result:
    """Fills the disk after a random checkpoint; needs root."""
    result = lab.result(f"a {TMPFS_BYTES >> 20} MiB tmpfs as run directory fills up in training")
    if os.geteuid() != 0:
        result.notes.append("SKIPPED: only root can mount a tmpfs")
        print("full_disk: SKIPPED: only root can mount a tmpfs", flush=True)
        result.is_skipped = True
        return result
    lab.trained()
    generator = lab.random("full_disk")
    for turn in range(lab.count(3)):
        _tmpfs_trial(lab, lab.place(f"tmpfs-{turn}"), 2 * generator.randint(1, 9), result)
    return result
