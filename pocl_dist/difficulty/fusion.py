"""One ranking from several signals: reciprocal rank fusion (POCL section 3.1). Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError
from pocl_dist.records import DifficultyRecord, RankedExample


def rank(values: Sequence[float], higher_is_easier: bool) -> list[float]:
    """Returns the rank of each value, the easiest 1; equal values share their group's mean rank.

    Raises DataError (65) for a value that is not finite: NaN has no place in any order.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        first = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise DataError(
            f"value {first + 1} of {len(numbers)} is {numbers[first]}: a score must be finite"
        )
    _, group, sizes = np.unique(
        -numbers if higher_is_easier else numbers, return_inverse=True, return_counts=True
    )
    num_before = np.cumsum(sizes) - sizes
    return (num_before + (sizes + 1) / 2)[group].tolist()  # type: ignore[no-any-return]


def fuse(records: Sequence[DifficultyRecord], k: float) -> list[RankedExample]:
    """Returns the examples easy to hard by `sum over signals of 1 / (k + rank)`, larger = easier.

    Equal fused scores are ordered by example id, so the ranking is a function of the scores alone.
    """
    columns = {name: [float(getattr(record, name)) for record in records] for name in SIGNALS}
    ranks = {}
    for name, signal in SIGNALS.items():
        try:
            ranks[name] = rank(columns[name], signal.higher_is_easier)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    ranked = []
    for index, record in enumerate(records):
        fields = {name: columns[name][index] for name in SIGNALS}
        fields |= {f"rank_{name}": ranks[name][index] for name in SIGNALS}
        fused_score = sum(1 / (k + ranks[name][index]) for name in SIGNALS)
        ranked.append(
            RankedExample(example_id=record.example_id, fused_score=fused_score, **fields)
        )
    return sorted(ranked, key=lambda example: (-example.fused_score, example.example_id))


def tie_shares(records: Sequence[DifficultyRecord]) -> dict[str, float]:
    """Returns, per signal, the share of rows (0..1) whose value another row has too."""
    shares = {}
    for name in SIGNALS:
        _, sizes = np.unique([getattr(record, name) for record in records], return_counts=True)
        shares[name] = float(sizes[sizes > 1].sum() / len(records)) if len(records) else 0.0
    return shares
