"""SIGTERM, SIGUSR1 and `control/stop` in every phase: 75, saved, the same end (T6)."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab, failing_at, known_failpoints
from tests.chaos.result import Result

# Phase -> (command, failpoint at which one process is held until the stop was asked for). A phase
# whose failpoint is not in the code is caught when the command has begun.
_PHASES: dict[str, tuple[str, str]] = {
    "init-student": ("init-student", "atomic_write.open=stop@4"),
    "generate": ("generate", "pass.before_save=stop@2"),
    "measure": ("measure", "pass.before_save=stop@1"),
    "plan": ("plan", "atomic_write.open=stop@4"),
    "cache": ("cache", "pass.after_shard=stop@1"),
    "distill, loading": ("distill", "loading=stop@1%0"),
    "distill, dev evaluation": ("distill", "evaluate.batch=stop@1%1"),
    "distill, step": ("distill", "train.before_step=stop@3%0"),
    "distill, step of rank 1": ("distill", "train.after_step=stop@3%1"),
    "distill, saving": ("distill", "checkpoint.before_rename=stop@1%0"),
    "distill, export": ("distill", "export.before=stop@1%0"),
    "evaluate": ("evaluate", "pass.before_save=stop@1"),
    "report": ("report", "atomic_write.open=stop@4"),
}
_LAST_OF_DISTILL = "distill, export"
_SHORT = ("init-student", "plan", "report")
_WAYS = ("SIGTERM", "SIGUSR1", "control/stop")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _held(job: Job) -> list[int]:
    """Returns the processes that hold still at a failpoint."""
    return [process.pid for process in job.processes() if process.state == "T"]


def _ask(job: Job, run_dir: Path, way: str) -> float:
    """Asks for the stop, then lets those that are held go on; returns when that was."""
    if way == "control/stop":
        (run_dir / "control").mkdir(exist_ok=True)
        (run_dir / "control" / "stop").touch()
    else:
        job.process.send_signal(getattr(signal, way))
    for process in job.processes():
        if process.state == "T":
            process.signal(signal.SIGCONT)
    return time.monotonic()


def _stop_in(lab: Lab, config: Path, phase: str, way: str, result: Result) -> None:
    """Starts the command, stops it in the phase, and lets passes come to their end after that."""
    command, entry = _PHASES[phase]
    run_dir, log = config.parent / "run", config.parent / "log.txt"
    has_place = entry.partition("=")[0] in known_failpoints()
    folder = config.parent / f"once-{phase.replace(', ', '-').replace(' ', '-')}"
    job = Job(
        log, command, str(config), environment=failing_at(folder, entry) if has_place else None
    )
    if has_place:
        is_there = job.wait_for(lambda: _held(job))
    else:
        is_there = job.wait_for(lambda: command in _text(run_dir / "status.json"))
        time.sleep(lab.random(phase).uniform(0.0, 8.0))
        result.notes.append(f"{phase}: at a random moment, {entry} is not in the code")
    if not is_there or job.process.poll() is not None:
        result.check(False, f"{phase}: over before it could be stopped ({job.wait(1)}, {log})")
        return
    asked_at = _ask(job, run_dir, way)
    code = job.wait(60)
    result.took(time.monotonic() - asked_at)
    status = json.loads(_text(run_dir / "status.json") or "{}").get("exit_code")
    left = job.leftovers()
    # What takes no time may as well be done before it looks.
    is_good = code == status and code in ((0, 75) if phase in _SHORT else (75,))
    problem = "" if is_good else f"exit code {code}, status {status}, expected 75"
    problem += f"; left behind: {left}" if left else ""
    problem += verify_problem(run_dir) if is_good else ""
    result.count(f"{phase}, {way}: {problem} ({log})" if problem else "")
    result.notes.append(f"{phase}, {way}: {time.monotonic() - asked_at:.1f} s, exit code {code}")
    if command != "distill":
        again = Job(log, command, str(config)).wait(120)
        result.check(again == 0, f"{phase}: then {again} ({log})")


def run(lab: Lab) -> Result:
    """Stops one run in each of its phases, in order, resumes it each time, and compares the end."""
    result = lab.result("SIGTERM, SIGUSR1 or `control/stop` in every phase, resumed")
    expected, _ = lab.whole(has_all_steps=True)
    config = lab.whole_config(lab.place("stop-phases"), has_all_steps=True)
    wanted = lab.random("stop_phases").sample(list(_PHASES), min(13, lab.count(len(_PHASES))))
    for turn, (phase, (command, _)) in enumerate(_PHASES.items()):
        if phase in wanted:
            _stop_in(lab, config, phase, _WAYS[(turn + lab.seed) % len(_WAYS)], result)
        elif command != "distill":
            Job(config.parent / "log.txt", command, str(config)).wait(120)
        if phase == _LAST_OF_DISTILL:  # else there is no export to be evaluated
            Job(config.parent / "log.txt", "distill", str(config)).wait(120)
    job = Job(config.parent / "log.txt", "run", str(config))
    code = job.wait(300)
    result.check(code == 0, f"the run could not be finished: {code} ({job.log})")
    result.check(not (left := job.leftovers()), f"left behind: {left}")
    result.compare(differences(expected, config.parent / "run"), "stop-phases")
    problem = verify_problem(config.parent / "run")
    result.check(not problem, problem)
    return result
