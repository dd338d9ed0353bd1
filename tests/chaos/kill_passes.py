"""SIGKILL of Ray actors and of the driver in measure, cache, generate and evaluate (T14)."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from tests.chaos.compare import differences, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab
from tests.chaos.result import Result

# What a pass writes, taken away before it is done again.
PASSES = {
    "generate": ("generated",),
    "measure": ("difficulty",),
    "cache": ("teacher_cache",),
    "evaluate": ("eval",),
}
KILLS_PER_PASS = 5


def _kill_actor(job: Job, generator: random.Random) -> float | None:
    """Kills an actor that has begun; returns when. None when the pass is over before."""
    if not job.wait_for(lambda: job.having("^ray::ModelWorker", "^ray::CacheWorker", "^ray::_")):
        return None
    job.wait_for(lambda: False, generator.uniform(0.0, 4.0))
    actors = job.having("^ray::")
    if not actors or not generator.choice(actors).signal(signal.SIGKILL):
        return None
    return time.monotonic()


def _kill_driver(job: Job, generator: random.Random) -> float | None:
    job.wait_for(lambda: job.having("^ray::"))
    job.wait_for(lambda: False, generator.uniform(0.0, 4.0))
    if job.process.poll() is not None:
        return None
    job.process.kill()
    return time.monotonic()


def _disturb(
    config: Path, step: str, wanted: int, result: Result, generator: random.Random
) -> None:
    """Does one pass in which actors die, and every third time the driver; resumed to its end."""
    num_kills, turn, code = 0, 0, -1
    while code != 0 and turn < 3 * KILLS_PER_PASS:
        job, turn = Job(config.parent / "log.txt", step, str(config)), turn + 1
        while num_kills < wanted:
            is_driver = num_kills % 3 == 2
            killed_at = (_kill_driver if is_driver else _kill_actor)(job, generator)
            if killed_at is None:
                break
            num_kills += 1
            if is_driver:
                job.wait(30)
                left = job.leftovers(20)
                result.took(time.monotonic() - killed_at)
                result.count(f"{step}: after the driver's death: {left}" if left else "")
                break
            result.count()
        code = job.wait(120)
        left = job.leftovers()
        result.check(not left, f"{step}: left behind: {left}")
        result.check(code in (0, -9, 71), f"{step}: exit code {code} ({job.log})")
    result.check(code == 0, f"{step} could not be finished: {code}")


def run(lab: Lab, kills_per_pass: int = KILLS_PER_PASS) -> Result:
    """Does each pass of a finished run again, disturbed, and compares all its results."""
    result = lab.result("SIGKILL of Ray actors and of the driver in each pass, resumed")
    expected, calm = lab.whole(has_all_steps=True)
    generator, wanted = lab.random("kill_passes"), lab.count(kills_per_pass)
    # In place: what is recorded of inputs (paths of generated rows) stays true.
    config = calm.parent / "config.yaml"
    for step, folders in PASSES.items():
        for name in folders:
            shutil.rmtree(calm / name)
        _disturb(config, step, wanted, result, generator)
        result.compare(differences(expected, calm), step)
        problem = verify_problem(calm)
        result.check(not problem, f"{step}: {problem}")
    result.notes.append(f"per pass {wanted} kills; of three in a row one is the driver")
    return result
