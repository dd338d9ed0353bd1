"""Clocks that disagree between ranks, and go back between two starts (T24)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pocl_dist.free_port import free_port
from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab, failing_at
from tests.chaos.result import Result

# Of Debian's package libfaketime.
_LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
              "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
              "/usr/lib64/faketime/libfaketime.so.1")  # fmt: skip
_DEATH = "train.before_step=kill@9%0"


def _library() -> str | None:
    return next((path for path in _LIBRARIES if os.path.exists(path)), None)


def _start_ranks(config: Path, turn: int, library: str, skews: tuple[str, str]) -> list[Job]:
    """Starts two ranks as a scheduler would that gives each host its rank; each has its clock."""
    port = free_port()
    jobs = []
    for rank, skew in enumerate(skews):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LD_PRELOAD": library, "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            **(failing_at(config.parent / "once", _DEATH) if turn == 0 else {}),
        }  # fmt: skip
        log = config.parent / f"log-{turn}-{rank}.txt"
        jobs.append(Job(log, "distill", str(config), environment=environment))
    return jobs


def run(lab: Lab) -> Result:
    """An hour between the ranks; rank 0 is killed with its lock, and wakes a day earlier."""
    result = lab.result("clocks of ranks an hour apart, and a day back at the next start")
    library = _library()
    if library is None:
        result.is_skipped = True
        result.notes.append("skipped: needs the Debian package libfaketime")
        return result
    config = lab.training_config(lab.place("clock-skew"))
    first = _start_ranks(config, 0, library, ("+0", "+3600s"))
    codes = [job.wait(120) for job in first]
    is_good = codes == [-signal.SIGKILL, 71]
    result.count("" if is_good else f"an hour apart, then rank 0 killed: {codes}")
    codes = [job.wait(120) for job in _start_ranks(config, 1, library, ("-86400s", "+3600s"))]
    result.count("" if codes == [0, 0] else f"a day back: {codes} ({config.parent})")
    result.compare(differences(lab.trained(), config.parent / "run"), "clock skew")
    problem = verify_problem(config.parent / "run")
    result.check(not problem, problem)
    return result
