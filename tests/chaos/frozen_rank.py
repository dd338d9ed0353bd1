"""A rank that is frozen (SIGSTOP) or hangs: named in time, all ended, resumed (T8)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.compare import differences
from tests.chaos.lab import Lab, failing_at, known_failpoints
from tests.chaos.result import Result

TIMEOUT_SECONDS = 6.0
# Beside engine.timeout_seconds: ticks of the watchdog, the others' stacks, the end of all.
PATIENCE_SECONDS = 10.0


def _freeze(run_dir: Path, rank: int, step: int) -> Callable[[list], float | None]:
    def disturb(processes: list) -> float | None:
        metrics = run_dir / "metrics.jsonl"
        while all(process.is_alive() for process in processes):
            if metrics.exists() and metrics.read_text().count('"kind": "step"') >= step:
                os.kill(processes[rank].pid, signal.SIGSTOP)
                return time.monotonic()
            time.sleep(0.02)
        return None

    return disturb


def _trial(lab: Lab, name: str, what: str, rank: int, result: Result) -> None:
    engine = {"timeout_seconds": TIMEOUT_SECONDS}
    config = lab.training_config(lab.place(name), engine=engine)
    run_dir = config.parent / "run"
    if what == "frozen":
        outcome = lab.train(config, disturb=_freeze(run_dir, rank, 5))
    else:
        entry = f"train.before_step=hang@5%{rank}"
        outcome = lab.train(config, environment=failing_at(config.parent / "once", entry))
        # Nobody saw when it began: the last sign of progress is the last line of the metrics.
        began = (run_dir / "metrics.jsonl").stat().st_mtime
        outcome_seconds = time.time() - began
        outcome = type(outcome)(outcome.codes, outcome.errors, outcome_seconds)
    status = json.loads((run_dir / "status.json").read_text()) if _has(run_dir) else {}
    reason = str(status.get("reason"))
    problem = ""
    if status.get("exit_code") != 71 or f"rank {rank} " not in reason:
        problem += f"status {status}; "
    if None in outcome.codes or outcome.is_done:
        problem += f"not ended: {outcome.codes}; "
    if outcome.seconds > TIMEOUT_SECONDS + PATIENCE_SECONDS + 10:
        problem += f"took {outcome.seconds:.0f} s; "
    result.count(f"{what} rank {rank}: {problem}" if problem else "")
    result.took(outcome.seconds)
    again = lab.train(config)
    result.check(again.is_done, f"{what} rank {rank}: did not go on: {again}")
    result.compare(differences(lab.trained(), run_dir), f"{what} rank {rank}")


def _has(run_dir: Path) -> bool:
    return (run_dir / "status.json").exists()


def run(lab: Lab) -> Result:
    """Each rank is frozen once, and hangs once where the code has the failpoint."""
    result = lab.result(
        f"a rank frozen (SIGSTOP) or hanging; `engine.timeout_seconds` {TIMEOUT_SECONDS:g}"
    )
    lab.trained()
    trials = [("frozen", 1), ("frozen", 0)]
    if "train.before_step" in known_failpoints():
        trials += [("hanging", 1), ("hanging", 0)]
    else:
        result.notes.append("hanging: the failpoint train.before_step is not in the code")
    for what, rank in trials[: lab.count(len(trials))]:
        _trial(lab, f"{what}-{rank}", what, rank, result)
    result.notes.append("worst s: from the fault (last step) to the end of the last rank")
    return result
