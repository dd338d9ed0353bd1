"""SIGKILL of the command or its launcher while ranks train: the ranks end too, then it goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job, Process
from tests.chaos.kill_run import ROLES
from tests.chaos.lab import Lab
from tests.chaos.result import Result

# A tick of the watchdog, a lost peer, the launcher's own way of ending the rest.
PATIENCE_SECONDS = 20.0


def _num_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def _victim(job: Job, role: str) -> Process:
    if role == "driver":
        return next(process for process in job.processes() if process.pid == job.process.pid)
    return next(process for process in job.having(*ROLES[role]))


def run(lab: Lab) -> Result:
    """`pocl-dist distill` on two ranks; its driver, then its launcher, is killed."""
    result = lab.result("SIGKILL of the command, or its launcher, while the ranks train")
    expected = lab.trained()
    config = lab.training_config(lab.place("kill-driver"), engine={"world_size": 2})
    run_dir, log = config.parent / "run", config.parent / "log.txt"
    for role in ("driver", "launcher"):
        job, before = Job(log, "distill", str(config)), _num_steps(run_dir)
        at_work = job.wait_for(lambda before=before: _num_steps(run_dir) > before + 3, 120)
        result.check(at_work, f"{role}: no steps in time")
        _victim(job, role).signal(signal.SIGKILL)
        killed_at = time.monotonic()
        code, left = job.wait(60), job.leftovers(PATIENCE_SECONDS)
        seconds = time.monotonic() - killed_at
        result.took(seconds)
        problem = "" if code == (-9 if role == "driver" else 71) else f"exit code {code}"
        problem += f"; alive {seconds:.0f} s later: {left}" if left else ""
        result.count(f"{role}: {problem}" if problem else "")
    job = Job(log, "distill", str(config))
    result.check(job.wait(120) == 0, f"could not be finished ({log})")
    result.check(not (left := job.leftovers()), f"left behind: {left}")
    result.compare(differences(expected, run_dir), "kill-driver")
    result.check(not (problem := verify_problem(run_dir)), problem)
    return result
