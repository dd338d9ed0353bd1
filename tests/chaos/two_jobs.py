"""Two jobs on one run directory, a fenced writer that wakes up, a restart loop (T22, T23)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab, known_failpoints
from tests.chaos.result import Result


def _num_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def _second_is_refused(job: Job, config: Path, result: Result) -> None:
    started = time.monotonic()
    second = Job(config.parent / "second.txt", "run", str(config))
    code, left = second.wait(60), second.leftovers()
    result.took(time.monotonic() - started)
    said = second.output()
    named = f"process {job.process.pid}" in said
    problem = "" if code == 73 and named and not left else f"{code}, {left}, {said[-300:]}"
    result.count(f"second job: {problem}" if problem else "")


def _freeze_and_take_over(job: Job, config: Path, result: Result) -> None:
    """Freezes the first job as a lost host would, lets a second go on, wakes the first."""
    run_dir = config.parent / "run"
    frozen = job.processes()
    for process in frozen:
        process.signal(signal.SIGSTOP)
    lock = run_dir / "lock"
    held = json.loads(lock.read_text())
    lock.write_text(json.dumps(held | {"place": "another host", "host": "elsewhere"}))
    os.utime(lock, (time.time() - 120, time.time() - 120))
    second = Job(config.parent / "second.txt", "run", str(config))
    before = _num_steps(run_dir)
    second.wait_for(lambda: _num_steps(run_dir) > before + 3, 90)
    for process in frozen:
        process.signal(signal.SIGCONT)
    code = job.wait(60)
    left = job.leftovers(30)
    second_code = second.wait(200)
    problem = "" if code != 0 and not left else f"the fenced job ended with {code}, left {left}"
    problem += "" if second_code == 0 else f"; the second ended with {second_code}"
    result.count(f"fenced writer: {problem} ({config.parent})" if problem else "")
    result.check(not second.leftovers(), "left behind by the second job")
    result.notes.append(f"the fenced job ended with {code}")


def _restart_loop(lab: Lab, result: Result) -> None:
    """A rank that dies before its first step in every attempt: given up, not tried for ever."""
    if "train.before_step" not in known_failpoints():
        result.notes.append("restart loop: the failpoint train.before_step is not in the code")
        return
    config = lab.training_config(
        lab.place("restart-loop"), engine={"world_size": 2, "timeout_seconds": 30}
    )
    environment = {"POCL_FAILPOINT": "train.before_step=kill@1%1"}
    words = ("distill", "--max-restarts", "9", str(config))
    job = Job(config.parent / "log.txt", *words, environment=environment)
    code, left = job.wait(240), job.leftovers()
    num_restarts = job.output().count("distill: restart")
    is_good = code == 71 and num_restarts <= 3 and not left
    result.count("" if is_good else f"restart loop: {code} after {num_restarts} restarts, {left}")
    result.notes.append(
        f"a rank that always dies: given up with {code} after {num_restarts} restarts"
    )


def run(lab: Lab) -> Result:
    """One run: while it trains a second is refused; then it is fenced; its end is compared."""
    result = lab.result("a second job on the run directory; a fenced writer; a restart loop")
    expected, _ = lab.whole()
    config = lab.whole_config(lab.place("two-jobs"))
    job = Job(config.parent / "log.txt", "run", str(config))
    job.wait_for(lambda: (config.parent / "run" / "lock").exists())
    _second_is_refused(job, config, result)
    job.wait_for(lambda: _num_steps(config.parent / "run") >= 5, 120)
    _freeze_and_take_over(job, config, result)
    result.compare(differences(expected, config.parent / "run"), "two jobs")
    problem = verify_problem(config.parent / "run")
    result.check(not problem, problem)
    _restart_loop(lab, result)
    return result
