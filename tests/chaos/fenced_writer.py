"""An attempt that lost its lock in the middle of training: it ends, and commits nothing (T23)."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pocl_dist.pipeline.run_directory import ATTEMPT_VARIABLE
from tests.chaos.compare import differences
from tests.chaos.lab import Lab
from tests.chaos.result import Result


def run(lab: Lab) -> Result:
    """Hands the lock to another attempt after a few checkpoints; the run is then resumed by it."""
    result = lab.result("the lock is another's: a fenced writer in the middle of training")
    expected, generator = lab.trained(), lab.random("fenced_writer")
    for turn in range(lab.count(2)):
        config = lab.training_config(lab.place(f"fenced-{turn}"))
        run_dir, after = config.parent / "run", 2 * generator.randint(1, 6)
        (run_dir / "lock").write_text(json.dumps({"attempt": 1}))
        committed: list[Path] = []

        def hand_over(
            processes: list, run_dir: Path = run_dir, after: int = after, seen: list = committed
        ) -> float | None:
            while all(process.is_alive() for process in processes):
                seen[:] = sorted(run_dir.glob("checkpoints/step-*"))
                if seen and int(seen[-1].name[5:]) >= after:
                    (run_dir / ".tmp-lock").write_text(json.dumps({"attempt": 2}))
                    (run_dir / ".tmp-lock").replace(run_dir / "lock")
                    # One that passed the check just before may still be renamed.
                    time.sleep(0.3)
                    seen[:] = sorted(run_dir.glob("checkpoints/step-*"))
                    return time.monotonic()
                time.sleep(0.01)
            return None

        outcome = lab.train(config, environment={ATTEMPT_VARIABLE: "1"}, disturb=hand_over)
        newest = max(run_dir.glob("checkpoints/step-*"))
        problem = "" if newest == committed[-1] else f"{newest.name} was committed all the same"
        names = {name for name, _ in outcome.errors}
        problem += "" if names == {"WorkerError"} else f"; it ended with {outcome}"
        result.count(f"after step {after}: {problem}" if problem else "")
        result.took(outcome.seconds)
        again = lab.train(config, environment={ATTEMPT_VARIABLE: "2"})
        result.check(again.is_done, f"attempt 2 did not go on: {again}")
        result.compare(differences(expected, run_dir), config.parent.name)
    return result
