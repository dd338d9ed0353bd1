"""SIGKILL of a rank at random moments and inside saving, chained through one training (T1-T3)."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.compare import differences
from tests.chaos.lab import Lab, failing_at, known_failpoints
from tests.chaos.result import Result

NUM_KILLS = 20
KILLS_PER_TRAINING = 7
_PLACES = (
    "checkpoint.before_write",
    "checkpoint.after_write",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.before_prune",
    "train.before_step",
    "train.after_step",
    "stage.before",
    "stage.after",
    "evaluate.batch",
    "export.before",
    "atomic_write.open",
    "atomic_write.before_rename",
    "atomic_write.after_rename",
)
# A rank that dies before all have met is "not reachable"; both codes mean "submit it again".
_PROMISED = {"WorkerError", "UnavailableError"}
# Only rank 0 passes these; the others would never die there.
_MAIN_ONLY = (
    "atomic_write",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.before_prune",
)


def _kill_after(rank: int, seconds: float) -> Callable[[list], float | None]:
    def disturb(processes: list) -> float | None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if not processes[rank].is_alive():
                return None  # the training was over before
            time.sleep(0.005)
        processes[rank].kill()
        return time.monotonic()

    return disturb


def _draw(generator: random.Random, folder: Path, turn: int) -> tuple[str, dict, Callable]:
    """Returns (what, environment, disturbance) of the next kill; every second one at a place."""
    rank = generator.randrange(2)
    places = [name for name in _PLACES if name in known_failpoints()]
    if turn % 2:
        place = places[(turn // 2 + generator.randrange(2)) % len(places)]
        rank = 0 if place.startswith(_MAIN_ONLY) else rank
        entry = f"{place}=kill@{generator.randint(1, 3)}%{rank}"
        return entry, failing_at(folder / f"once-{turn}", entry), lambda processes: None
    seconds = generator.uniform(0.5, 7.0)
    return f"rank {rank} after {seconds:.2f} s", {}, _kill_after(rank, seconds)


def run(lab: Lab, num_kills: int = NUM_KILLS) -> Result:
    """Kills, resumes, kills again; every training that gets to its end is compared."""
    result = lab.result("SIGKILL of a rank at random moments and inside saving, resumed each time")
    expected, generator = lab.trained(), lab.random("kill_training")
    wanted, chain, turn = lab.count(num_kills), 0, 0
    while result.num_faults < wanted:
        checkpoint = {"asynchronous": chain % 2 == 1}
        config = lab.training_config(lab.place(f"kill-training-{chain}"), checkpoint=checkpoint)
        run_dir, chain = config.parent / "run", chain + 1
        is_done, last = False, min(wanted, result.num_faults + KILLS_PER_TRAINING)
        while not is_done:
            what, environment, disturb = "nothing", {}, lambda processes: None
            if result.num_faults < last:
                what, environment, disturb = _draw(generator, config.parent, turn)
                turn += 1
            outcome = lab.train(config, 2, environment, disturb)
            is_done = outcome.is_done
            if -signal.SIGKILL in outcome.codes:
                others = [name for name, _ in outcome.errors]
                problem = "" if set(others) <= _PROMISED else str(outcome)
                result.count(f"{what}: {problem}" if problem else "")
                result.took(outcome.seconds)
            elif not is_done:
                result.count(f"{config.parent.name}, {what}: {outcome}")
                break
        result.compare(differences(expected, run_dir), config.parent.name)
    missing = sorted(set(_PLACES) - known_failpoints())
    if missing:
        result.notes.append(f"failpoints not in the code: {', '.join(missing)}")
    result.notes.append(
        f"{chain} trainings of 27 steps on 2 ranks, every second one saving asynchronously"
    )
    return result
