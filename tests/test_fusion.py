"""Ranks and reciprocal rank fusion, against counting by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from pocl_dist.difficulty.fusion import Fused, fuse, rank, tie_shares
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError
from pocl_dist.records import DifficultyRecord
from tests.ranked import counted_rank, ranked


def columns_of(records: Sequence[DifficultyRecord]) -> dict[str, np.ndarray]:
    """Returns the signals' values of records in the order of their ids."""
    in_order = sorted(records, key=lambda record: record.example_id)
    return {name: np.array([getattr(record, name) for record in in_order]) for name in SIGNALS}


def fused(records: Sequence[DifficultyRecord], k: float = 60) -> Fused:
    return fuse(columns_of(records), k)


def ranking(records: Sequence[DifficultyRecord], k: float = 60) -> list[str]:
    ids = sorted(record.example_id for record in records)
    return [ids[place] for place in fused(records, k).easy_to_hard]


def random_records(seed: int, num_records: int = 40) -> list[DifficultyRecord]:
    generator = random.Random(seed)
    return [
        DifficultyRecord(
            f"row-{index:02d}",
            generator.choice([0.0, 0.25, 1.0]),
            generator.randint(1, 9) / 4,
            3,
            "",
        )
        for index in range(num_records)
    ]


@pytest.mark.parametrize("higher_is_easier", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_start_at_one_and_ties_share_the_mean_rank(seed: int, higher_is_easier: bool) -> None:
    generator = random.Random(seed)
    values = [generator.choice([-1.5, 0.0, -0.0, 0.5, 2.0, 1e-9]) for _ in range(30)]
    expected = [counted_rank(values, index, higher_is_easier) for index in range(len(values))]
    found = rank(np.array(values), higher_is_easier)
    assert found.tolist() == expected
    assert found.sum() == 30 * 31 / 2


def test_a_row_that_is_easier_in_both_signals_comes_first() -> None:
    records = [DifficultyRecord("hard", 0.1, 3.0, 2, ""), DifficultyRecord("easy", 0.9, 0.5, 2, "")]
    assert ranking(records) == ["easy", "hard"]


@pytest.mark.parametrize("k", [60.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_columns_come_to_what_ranking_row_by_row_does_to_the_bit(seed: int, k: float) -> None:
    records = random_records(seed)
    found, expected = fused(records, k), ranked(records, k)
    assert ranking(records, k) == [example.example_id for example in expected]
    assert found.fused_score[found.easy_to_hard].tolist() == [e.fused_score for e in expected]
    for name in SIGNALS:
        ranks = found.ranks[name][found.easy_to_hard].tolist()
        assert ranks == [getattr(example, f"rank_{name}") for example in expected]
    assert len({example.fused_score for example in expected}) < len(expected)  # equal: by id


def test_the_order_of_the_records_does_not_matter() -> None:
    records = random_records(1)
    shuffled = random.Random(2).sample(records, len(records))
    assert ranking(records) == ranking(shuffled)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="cross_entropy: value 2 of 2 is"):
        fused([DifficultyRecord("a", 0, 1, 1, ""), DifficultyRecord("b", 0, value, 1, "")])


def test_the_share_of_ties_counts_rows_with_an_equal_one() -> None:
    records = [
        DifficultyRecord(str(index), [0, 0, 0, 1][index], index, 1, "") for index in range(4)
    ]
    assert tie_shares(columns_of(records)) == {"rouge_l": 0.75, "cross_entropy": 0.0}


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_has_its_field_in_the_records(name: str) -> None:
    assert name in DifficultyRecord.__dataclass_fields__
