"""SIGKILL of Ray actors and of the driver in generate, measure, cache and evaluate (T14)."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from tests.chaos.compare import differences, fingerprint, verify_problem
from tests.chaos.jobs import Job
from tests.chaos.lab import Lab, failing_at, known_failpoints
from tests.chaos.result import Result

KILLS_PER_PASS = 5
KILLS_PER_ATTEMPT = 2
MOST_ATTEMPTS = 12
# Each step of a run; of a pass also where its results lie.
STEPS: dict[str, str | None] = {
    "init-student": None,
    "generate": "generated",
    "measure": "difficulty",
    "plan": None,
    "cache": "teacher_cache",
    "distill": None,
    "evaluate": "eval",
    "report": None,
}
# In the driver, and in the actors.
_PLACES = ("pass.before_save", "pass.after_shard", "actor.before_batch", "actor.after_batch")


def _entries(generator: random.Random, num: int) -> list[str]:
    """Returns failpoints at which processes die, a few passes apart."""
    known = known_failpoints()
    places = [place for place in _PLACES if place in known]
    if not places:
        return []
    return [f"{generator.choice(places)}=kill@{generator.randint(1, 3)}" for _ in range(num)]


def _kill_actor(job: Job, generator: random.Random, result: Result) -> None:
    """Kills one actor at a random moment after the first came up, unless the pass is over."""
    job.wait_for(lambda: job.having("^ray::ModelWorker", "^ray::CacheWorker"))
    job.wait_for(lambda: False, generator.uniform(0.0, 4.0))
    actors = job.having("^ray::ModelWorker", "^ray::CacheWorker")
    if actors and generator.choice(actors).signal(signal.SIGKILL):
        result.count()


def _attempt(job: Job, is_actor: bool, generator: random.Random, result: Result, once: Path) -> int:
    """Waits for the end of a disturbed pass; counts its kills; returns its exit code."""
    before = set(once.iterdir())
    for _ in range(KILLS_PER_ATTEMPT if is_actor else 0):
        _kill_actor(job, generator, result)
    code = job.wait(150)
    ended_at = time.monotonic()
    left = job.leftovers(20)
    fired = set(once.iterdir()) - before
    if code == -signal.SIGKILL:
        result.took(time.monotonic() - ended_at)
    problem = "" if code in (0, 71, -signal.SIGKILL) else f"exit code {code}"
    problem += f"; left behind: {left}" if left else ""
    for path in fired:
        result.count(f"{path.name}: {problem} ({job.log})" if problem else "")
    result.check(fired or not problem, f"{problem} ({job.log})")
    return code


def _disturb(
    config: Path, step: str, wanted: int, result: Result, generator: random.Random
) -> None:
    """Does a pass, anew if need be, until `wanted` processes were killed in it; to its end."""
    first, num_attempts, code = result.num_faults, 0, -1
    while (code != 0 or result.num_faults - first < wanted) and num_attempts < MOST_ATTEMPTS:
        if code == 0:
            shutil.rmtree(config.parent / "run" / str(STEPS[step]))
        once = config.parent / f"once-{step}-{num_attempts}"
        is_open = result.num_faults - first < wanted
        entries = _entries(generator, KILLS_PER_ATTEMPT) if is_open and num_attempts % 2 else []
        environment = failing_at(once, *entries)
        job = Job(config.parent / "log.txt", step, str(config), environment=environment)
        code = _attempt(job, is_open and not entries, generator, result, once)
        num_attempts += 1
    result.check(code == 0, f"{step} could not be finished: {code}")


def run(lab: Lab, kills_per_pass: int = KILLS_PER_PASS) -> Result:
    """Makes a run step by step, each pass disturbed; each pass, and the end, is compared."""
    result = lab.result("SIGKILL of Ray actors and of the driver in each pass, resumed")
    expected, _ = lab.whole(has_all_steps=True)
    generator, wanted = lab.random("kill_passes"), lab.count(kills_per_pass)
    config = lab.whole_config(lab.place("kill-passes"), has_all_steps=True)
    run_dir = config.parent / "run"
    for step, folder in STEPS.items():
        if folder is None:
            code = Job(config.parent / "log.txt", step, str(config)).wait(150)
            result.check(code == 0, f"{step}: exit code {code}")
            continue
        _disturb(config, step, wanted, result, generator)
        own = {k: v for k, v in fingerprint(run_dir).items() if k.startswith(folder)}
        wrong = [
            name
            for name, digest in expected.items()
            if name.startswith(folder) and "ranking" not in name and own.get(name) != digest
        ]
        result.compare(wrong, step)
    result.compare(differences(expected, run_dir), "kill-passes")
    problem = verify_problem(run_dir)
    result.check(not problem, problem)
    result.notes.append(f"per pass {wanted} kills or more, at random moments and at failpoints")
    return result
