"""Resumed in the middle of a stage on another number of ranks: the same losses and rows (T12)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pocl_dist.config import load_config
from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.chaos.lab import Lab, log_to_file
from tests.chaos.result import Result

NEXT_STEPS = 20
TOLERANCE = 1e-5
# World sizes one after the other, and the steps after which the run is stopped.
CHANGES = (((2, 1), (5,)), ((1, 2), (5,)), ((2, 1, 2), (4, 12)), ((2, 4), (5,)))


def _train(config_path: str, stop_after: int | None, ids_file: str) -> None:
    """Trains, stops by the stop file, and notes which rows each step was taken on."""
    from pocl_dist.errors import StoppedError
    from pocl_dist.pipeline import distill as step

    log_to_file(config_path)
    config = load_config([config_path])
    run = RunDirectory(Path(config.run_dir))
    digest = step.applied_digest

    def noted(instruction, temperature, kd_ratio, learning_rate, ids):  # type: ignore[no-untyped-def]
        if os.environ["RANK"] == "0":
            with open(ids_file, "a") as stream:
                stream.write(json.dumps([instruction.step, list(ids)]) + "\n")
            if instruction.step + 1 == stop_after:
                run.stop_file.parent.mkdir(exist_ok=True)
                run.stop_file.touch()
        return digest(instruction, temperature, kd_ratio, learning_rate, ids)

    step.applied_digest = noted  # type: ignore[assignment]
    try:
        step.distill_rank(config, run)
    except StoppedError:
        if stop_after is None:
            raise
    finally:
        step.applied_digest = digest


def _trained(lab: Lab, name: str, sizes: tuple[int, ...], stops: tuple[int, ...]) -> tuple:
    """Returns ({step: loss}, {step: row ids}) of a run over these world sizes."""
    from tests.ranks import run_ranks

    config = lab.training_config(lab.place(name))
    ids_file, run = config.parent / "ids.jsonl", RunDirectory(config.parent / "run")
    for size, stop in zip(sizes, (*stops, None), strict=True):
        run_ranks(_train, size, str(config), stop, str(ids_file))
        run.stop_file.unlink(missing_ok=True)
    rows = [row for row in read_json_lines(run.metrics) if row["kind"] == "step"]
    losses = {int(str(row["step"])): float(str(row["loss"])) for row in rows}
    return losses, dict(map(json.loads, ids_file.read_text().splitlines()))


def run(lab: Lab) -> Result:
    """Each change is compared with two ranks all the way."""
    result = lab.result("world size changed in the middle of a stage, resumed")
    losses, ids = _trained(lab, "same-size", (2,), ())
    worst = 0.0
    for sizes, stops in CHANGES[: lab.count(len(CHANGES))]:
        name = " to ".join(map(str, sizes))
        found, found_ids = _trained(lab, f"sizes-{name.replace(' ', '-')}", sizes, stops)
        first = stops[0] + 1
        gaps = [abs(found[s] - losses[s]) for s in range(first, first + NEXT_STEPS)]
        worst = max(worst, *gaps)
        problem = "" if max(gaps) <= TOLERANCE else f"losses {max(gaps):.2g} apart"
        problem += "" if list(found) == list(losses) else "; other steps"
        result.count(f"{name}: {problem}" if problem else "")
        result.compare([] if found_ids == ids else ["order of the rows"], name)
    result.notes.append(
        f"next {NEXT_STEPS} losses at most {worst:.1e} apart (allowed {TOLERANCE:g}); "
        "identical: the rows of every step"
    )
    return result
