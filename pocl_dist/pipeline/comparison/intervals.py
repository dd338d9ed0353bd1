"""Mean, standard deviation over seeds, and a paired bootstrap interval. Loads no torch.

The interval is the percentile bootstrap over test examples (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13), paired as in Koehn, Statistical Significance Tests for Machine
Translation Evaluation, EMNLP 2004: a resample draws examples with replacement, once for both arms
and all seeds, so that what is hard for everyone cancels out. It says how far the difference of
*these trained models* depends on which examples are in the test set. How far it depends on the
training seed is told by the standard deviation over seeds beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
BOOTSTRAP_SEED = 20250605
_DRAWS_AT_ONCE = 2_000_000

Scores = npt.NDArray[np.float64]
"""Scores (seeds, examples) of an arm on a test set, in percent."""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None for a single seed
    num_seeds: int


@dataclass(frozen=True)
class Interval:
    """Where the mean lies in so many of the resamples."""

    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and sample standard deviation (n - 1) of one figure per seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(math.fsum(values) / len(values), std, len(values))


def bootstrap(
    differences_of_set: Sequence[Scores],
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> Interval:
    """Returns the percentile interval of the mean over test sets of the mean difference in each.

    `differences_of_set`: one array (seeds, examples) per test set, arm minus other arm. Each test
    set is resampled for itself; one set is the usual case. The same input, the same interval.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    # Examples are drawn for all seeds at once, so the seeds can be averaged before.
    per_example = [differences.mean(axis=0) for differences in differences_of_set]
    means = np.mean(
        [_resampled_means(row, num_resamples, generator) for row in per_example], axis=0
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def _resampled_means(values: Scores, num_resamples: int, generator: np.random.Generator) -> Scores:
    """Returns the mean of each resample of `values`; memory is bounded whatever their number."""
    num_values = len(values)
    at_once = max(1, _DRAWS_AT_ONCE // num_values)
    parts = []
    for start in range(0, num_resamples, at_once):
        shape = (min(at_once, num_resamples - start), num_values)
        parts.append(values[generator.integers(0, num_values, shape)].mean(axis=1))
    return np.concatenate(parts)
