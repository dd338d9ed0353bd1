"""The scores of a run's answers, per test set and example. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocl_dist.errors import DataError
from pocl_dist.files import read_json_lines
from pocl_dist.pipeline.comparison.intervals import Scores
from pocl_dist.pipeline.run_directory import RunDirectory

METRICS = ("rouge_l", "exact_match")
AVERAGE = "average"
"""Name of the unweighted mean over test sets, when there are several."""


@dataclass(frozen=True)
class SetScores:
    """Scores in percent of every example of a test set, each a mean over the sampling seeds."""

    of_metric: Mapping[str, Mapping[str, float]]  # metric -> {example id: score}

    def mean(self, metric: str) -> float:
        """Returns the score of the set."""
        values = self.of_metric[metric].values()
        return math.fsum(values) / len(values)

    @property
    def num_examples(self) -> int:
        """Returns the number of examples."""
        return len(self.of_metric[METRICS[0]])


ScoresOfArm = Mapping[int, Mapping[str, SetScores]]
"""Seed -> test set -> scores, of the runs that are done."""


def columns_of(sets: Sequence[str]) -> dict[str, list[str]]:
    """Returns {column: the test sets it is a mean of}."""
    columns = {name: [name] for name in sets}
    return columns | ({AVERAGE: list(sets)} if len(sets) > 1 else {})


def read_scores(answers: Path) -> SetScores:
    """Returns the scores of a file of answers (`eval/<set>/answers.jsonl`)."""
    found: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    for row in read_json_lines(answers):
        for metric in METRICS:
            score = 100.0 * float(str(row[metric]))
            found[metric].setdefault(str(row["id"]), []).append(score)
    if not found[METRICS[0]]:
        raise DataError(f"{answers}: holds no answers; remove it and evaluate again")
    return SetScores(
        {
            metric: {name: math.fsum(values) / len(values) for name, values in rows.items()}
            for metric, rows in found.items()
        }
    )


def run_scores(run: RunDirectory, sets: Sequence[str]) -> dict[str, SetScores]:
    """Returns {test set: scores} of a run that is done."""
    return {name: read_scores(run.eval / name / "answers.jsonl") for name in sets}


def paired(
    ours: Mapping[int, SetScores], theirs: Mapping[int, SetScores], metric: str
) -> tuple[list[int], Scores]:
    """Returns (seeds, differences (seeds, examples)): ours minus theirs, joined by example id.

    Seeds that one side lacks are left out. Raises DataError (65) for other examples.
    """
    seeds = [seed for seed in ours if seed in theirs]
    rows = []
    for seed in seeds:
        mine, other = ours[seed].of_metric[metric], theirs[seed].of_metric[metric]
        if mine.keys() != other.keys():
            raise DataError(f"seed {seed}: the arms were tested on other examples")
        rows.append([mine[name] - other[name] for name in sorted(mine)])
    return seeds, np.array(rows, dtype=np.float64)
