"""SIGTERM, SIGUSR1 and `control/stop` in every phase: 75, saved, the same end (T6)."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab, failing_at, known_failpoints
from tests.chaos.result import Result

# Phase -> (command, failpoints at which a process is held until the stop was asked for; the first
# that the code has is taken). One without failpoint is caught when its line is printed.
_PHASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "init-student": ("run", ()),
    "generate": ("run", ("pass.before_save", "pass.after_shard")),
    "measure": ("run", ("pass.before_save", "pass.after_shard")),
    "plan": ("plan", ("atomic_write.open=stop@4",)),
    "cache": ("run", ("pass.before_save", "pass.after_shard")),
    "distill: load": ("run", ()),
    "distill: dev evaluation": ("run", ("evaluate.batch",)),
    "distill: step": ("run", ("train.before_step=stop@3%0",)),
    "distill: step of rank 1": ("run", ("train.before_step=stop@2%1",)),
    "distill: save": ("run", ("checkpoint.before_rename=stop@1%0",)),
    "evaluate": ("run", ("pass.before_save", "pass.after_shard")),
    "report": ("report", ("atomic_write.open=stop@4",)),
}  # fmt: skip
_WAYS = ("SIGTERM", "SIGUSR1", "control/stop")


def _is_in(job: Job, run_dir: Path, phase: str) -> Callable[[], bool]:
    """Returns whether the run is in a phase, as its output and signs of life say."""
    name, _, inside = phase.partition(": ")

    def look() -> bool:
        if f"── {name}" not in job.output():
            return False
        if inside == "load":
            return bool(job.having("-m pocl_dist distill"))
        if inside:
            return '"kind": "step"' in _text(run_dir / "metrics.jsonl")
        return True

    return look


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _held(job: Job) -> list[int]:
    """Returns the processes that hold still at a failpoint."""
    return [process.pid for process in job.processes() if process.state == "T"]


def _ask(job: Job, run_dir: Path, way: str) -> None:
    if way == "control/stop":
        (run_dir / "control").mkdir(exist_ok=True)
        (run_dir / "control" / "stop").touch()
    else:
        job.process.send_signal(getattr(signal, way))


def _stop_in(lab: Lab, config: Path, phase: str, way: str, result: Result) -> int:
    """Starts the command, stops it in the phase; returns its exit code."""
    command, places = _PHASES[phase]
    run_dir, known = config.parent / "run", known_failpoints()
    place = next((p for p in places if p.partition("=")[0] in known), None)
    environment: dict[str, str] = {}
    if place is not None:
        entry = place if "=" in place else f"{place}=stop@1"
        environment = failing_at(config.parent / f"once-{phase.replace(' ', '-')}", entry)
    job = Job(config.parent / "log.txt", command, str(config), environment=environment)
    if place is None:
        is_there = job.wait_for(_is_in(job, run_dir, phase))
        time.sleep(lab.random(phase).uniform(0.0, 1.5) if ":" in phase else 0.3)
    else:
        is_there = job.wait_for(lambda: _held(job))
    if not is_there or job.process.poll() is not None:
        result.notes.append(f"{phase}: over before it could be stopped")
        return job.wait(200)
    _ask(job, run_dir, way)
    asked_at = time.monotonic()
    for process in job.processes():
        if process.state == "T":
            process.signal(signal.SIGCONT)
    code = job.wait(60)
    seconds = time.monotonic() - asked_at
    left = job.leftovers()
    status = json.loads(_text(run_dir / "status.json") or "{}").get("exit_code")
    problem = "" if code == status == 75 else f"exit code {code}, status {status}, expected 75"
    if code == status == 0 and phase in ("plan", "report", "init-student"):
        problem = ""  # it was done before it looked: as good
    problem += f"; left behind: {left}" if left else ""
    damaged = verify_problem(run_dir) if code == 75 else ""
    problem += damaged
    result.count(f"{phase}, {way}: {problem} ({job.log})" if problem else "")
    result.took(seconds)
    result.notes.append(f"{phase}, {way}: {seconds:.1f} s, exit code {code}")
    return code


def run(lab: Lab) -> Result:
    """Stops one run in each of its phases, in order, resumes it each time, and compares the end."""
    result = lab.result("SIGTERM, SIGUSR1 or `control/stop` in every phase, resumed")
    expected, _ = lab.whole(has_all_steps=True)
    config = lab.whole_config(lab.place("stop-phases"), has_all_steps=True)
    phases = list(_PHASES)
    if lab.scale < 1:
        phases = lab.random("stop_phases").sample(phases, lab.count(len(phases)))
    for turn, phase in enumerate(phase for phase in _PHASES if phase in phases):
        _stop_in(lab, config, phase, _WAYS[turn % len(_WAYS)], result)
    job = Job(config.parent / "log.txt", "run", str(config))
    code = job.wait(300)
    result.check(code == 0, f"the run could not be finished: {code} ({job.log})")
    result.check(not (left := job.leftovers()), f"left behind: {left}")
    result.compare(differences(expected, config.parent / "run"), "stop-phases")
    problem = verify_problem(config.parent / "run")
    result.check(not problem, problem)
    return result
