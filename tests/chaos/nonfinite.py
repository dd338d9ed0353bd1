"""NaN in the loss of one rank: all leave the step out; too many in a row end the run (T11)."""

from __future__ import annotations

import os
from pathlib import Path

from pocl_dist.config import load_config
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.chaos.compare import fingerprint
from tests.chaos.lab import Lab, log_to_file
from tests.chaos.result import Result


def _train(config_path: str, rank: int, first: int, last: int) -> None:
    """Trains; the loss of `rank` is NaN in its micro-batches `first` to `last`."""
    from pocl_dist.pipeline import train_step
    from pocl_dist.pipeline.distill import distill_rank

    log_to_file(config_path)
    config, num_seen = load_config([config_path]), 0
    forward_backward = train_step._forward_backward

    def spoiled(*arguments):  # type: ignore[no-untyped-def]
        nonlocal num_seen
        num_seen += 1
        loss_sum, part_sums = forward_backward(*arguments)
        is_bad = os.environ["RANK"] == str(rank) and first <= num_seen <= last
        return (loss_sum * float("nan"), part_sums) if is_bad else (loss_sum, part_sums)

    train_step._forward_backward = spoiled
    try:
        distill_rank(config, RunDirectory(Path(config.run_dir)))
    finally:
        train_step._forward_backward = forward_backward


def _result_of(run_dir: Path) -> dict[str, str]:
    return {k: v for k, v in fingerprint(run_dir).items() if k not in ("steps", "dev")}


def run(lab: Lab) -> Result:
    """One bad step of either rank gives the same weights; a lasting one ends the run with 76."""
    from tests.ranks import run_ranks_with_errors

    result = lab.result("NaN in the loss of one rank, once and for good")
    if not hasattr(load_config([lab.training_config(lab.place("knobs"))]), "nonfinite"):
        result.notes.append("the section `nonfinite` is not in the code")
        return result
    found = []
    for rank in (0, 1):
        config = lab.training_config(lab.place(f"nan-{rank}"))
        rows = run_ranks_with_errors(_train, 2, str(config), rank, 7, 7)
        errors = [error[:2] for _, error in rows if error]
        result.count(f"NaN on rank {rank}: {errors}" if errors else "")
        found.append(_result_of(config.parent / "run"))
    differing = sorted(name for name in found[0] if found[0][name] != found[1].get(name))
    result.compare(differing, "NaN on rank 0 and on rank 1")
    calm = {name: digest for name, digest in lab.trained().items() if name in found[0]}
    result.check(found[0] != calm, "nothing was left out")
    config = lab.training_config(lab.place("nan-for-good"))
    rows = run_ranks_with_errors(_train, 2, str(config), 1, 7, 10**6)
    errors = [error[0] for _, error in rows if error]
    result.count("" if errors == ["DivergedError"] * 2 else f"NaN for good: {errors}, not 76 twice")
    return result
