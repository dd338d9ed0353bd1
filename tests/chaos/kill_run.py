"""SIGKILL of driver, launcher, rank or actor at random moments of a whole `pocl-dist run`."""

from __future__ import annotations

import random
import signal
import time

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job, Process
from tests.chaos.lab import Lab
from tests.chaos.result import Result

NUM_KILLS = 10
KILLS_PER_RUN = 5
LONGEST_SECONDS = 30.0
# Command lines and titles, as /proc shows them.
ROLES = {
    "launcher": ("deepspeed.launcher.runner", "deepspeed/launcher/launch.py", "launcher.launch"),
    "rank": ("-m pocl_dist distill",),
    "actor": ("^ray::",),
    "Ray's daemon": ("ray/core/src/ray/raylet/raylet", "ray/core/src/ray/gcs/gcs_server"),
}
# Exit codes of the run after its death: 69 where the others had not met it yet.
_PROMISED = {
    "driver": (-signal.SIGKILL,),
    "launcher": (71,),
    "rank": (69, 71),
    "actor": (0, 71),
    "Ray's daemon": (69, 71),
}


def _victim(job: Job, generator: random.Random) -> tuple[str, Process | None]:
    """Returns (role, process) of what is to be killed: mostly of what is at work just now."""
    groups = {
        role: [process for process in job.having(*words) if process.pid != job.process.pid]
        for role, words in ROLES.items()
    }
    roles = sorted(role for role, processes in groups.items() if processes)
    role = generator.choice(["driver", *roles, *roles])
    if role == "driver":
        own = [process for process in job.processes() if process.pid == job.process.pid]
        return role, own[0] if own else None
    return role, generator.choice(groups[role])


def _kill_once(job: Job, result: Result, generator: random.Random, what: list[str]) -> None:
    """Kills something after a random time, unless the run is over by then."""
    seconds = generator.uniform(1.0, LONGEST_SECONDS)
    if job.wait_for(lambda: False, seconds) or job.process.poll() is not None:
        return
    role, victim = _victim(job, generator)
    if victim is None or not victim.signal(signal.SIGKILL):
        return
    killed_at = time.monotonic()
    code = job.wait(90)
    ended = time.monotonic() - killed_at
    left = job.leftovers(20)
    gone = time.monotonic() - killed_at
    allowed = _PROMISED[role]
    what.append(f"{role} after {seconds:.1f} s")
    problem = "" if code in allowed else f"exit code {code}, expected one of {allowed}"
    if left:
        problem += f"; alive {gone:.0f} s later: {left}"
    result.count(f"{what[-1]}: {problem} ({job.log})" if problem else "")
    # An actor's death does not end the run: there is nothing to wait for.
    result.took(gone if role != "actor" or code else 0.0)
    result.check(ended < 60, f"{what[-1]}: the run ended only after {ended:.0f} s")


def run(lab: Lab, num_kills: int = NUM_KILLS) -> Result:
    """Runs, kills, resumes: several times in one run directory, then lets it come to its end."""
    result = lab.result("SIGKILL of driver, launcher, rank or actor in a whole `run`, resumed")
    generator, (expected, _) = lab.random("kill_run"), lab.whole()
    wanted, chain = lab.count(num_kills), 0
    what: list[str] = []
    while result.num_faults < wanted:
        config, chain = lab.whole_config(lab.place(f"kill-run-{chain}")), chain + 1
        log, code, turn = config.parent / "log.txt", -1, 0
        while code != 0 and turn < 4 * KILLS_PER_RUN:
            job = Job(log, "run", str(config))
            if turn < KILLS_PER_RUN and result.num_faults < wanted:
                _kill_once(job, result, generator, what)
            code, turn = job.wait(240), turn + 1
            if turn > KILLS_PER_RUN and code not in (0, 69, 71):
                break
        result.check(code == 0, f"{log}: the run could not be finished: {code}")
        result.compare(differences(expected, config.parent / "run"), config.parent.name)
        problem = verify_problem(config.parent / "run")
        result.check(not problem, f"{config.parent.name}: {problem}")
    result.notes.append("killed: " + ", ".join(what))
    return result
