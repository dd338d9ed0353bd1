"""The learning rate of an arm: the best of the grid on dev, with the first seed. Loads no torch.

All arms choose from one grid by the same rule and never see a test set; the rate that won is then
that of every seed (docs/decisions/compare.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_dist.config import Config
from pocl_dist.errors import ConfigError, DivergedError
from pocl_dist.files import JSONValue, read_json_lines
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.comparison.state import RunLook


@dataclass(frozen=True)
class Candidate:
    """One learning rate of the grid: how its run stands, and its dev metric when it is trained."""

    learning_rate: float
    look: RunLook
    dev: float | None


def grid_of(base: Config, asked: Sequence[float]) -> tuple[float, ...]:
    """Returns the grid, ascending; without one the config's own learning rate.

    Raises ConfigError (64) for a choice without `data.dev`: it would need a test set.
    """
    grid = tuple(sorted(asked)) or (base.optimizer.learning_rate,)
    if len(grid) > 1 and base.data.dev is None:
        raise ConfigError(
            f"--lr-grid: {len(grid)} learning rates need data.dev to choose by; a test set is "
            "never chosen on"
        )
    return grid


def dev_of(compared: ComparedRun) -> float | None:
    """Returns the dev metric of the weights that a finished training exported; None without dev."""
    rows = [row for row in read_json_lines(compared.run.metrics) if row["kind"] == "dev"]
    values = [float(str(row["value"])) for row in rows]
    if not values:
        return None
    if compared.config.export.select == "best_dev":
        return max(values) if compared.config.dev.is_higher_better else min(values)
    return values[-1]


def choose(candidates: Sequence[Candidate], higher_is_better: bool) -> float | None:
    """Returns the learning rate with the best dev metric, the smaller one of equal ones.

    A grid of one is no choice. None when no candidate was trained to its end.
    """
    if len(candidates) == 1:
        return candidates[0].learning_rate
    sign = 1.0 if higher_is_better else -1.0
    trained = [c for c in candidates if c.dev is not None]
    if not trained:
        return None
    return max(trained, key=lambda c: (sign * (c.dev or 0.0), -c.learning_rate)).learning_rate


def is_settled(candidates: Sequence[Candidate]) -> bool:
    """Returns whether nothing can change the choice any more: all were trained, or diverged."""
    is_choice = len(candidates) > 1
    ends = (c.dev is not None or c.look.exit_code == DivergedError.exit_code for c in candidates)
    return not is_choice or all(ends)


def to_json(candidates: Sequence[Candidate], seed: int, chosen: float | None) -> JSONValue:
    """Returns the choice as `comparison.json` has it."""
    return {
        "grid": [candidate.learning_rate for candidate in candidates],
        "seed": seed,
        "chosen": chosen,
        "candidates": [
            {
                "learning_rate": candidate.learning_rate,
                "dev": candidate.dev,
                "state": candidate.look.state,
                "reason": candidate.look.reason,
            }
            for candidate in candidates
        ],
    }
