"""Ranks and reciprocal rank fusion, against counting by hand."""

from __future__ import annotations

import math
import random

import pytest

from pocl_dist.difficulty.fusion import fuse, rank, tie_shares
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError
from pocl_dist.records import DifficultyRecord, RankedExample


def counted_rank(values: list[float], index: int, higher_is_easier: bool) -> float:
    """One more than the easier values, and half a place for each equal one."""
    sign = -1 if higher_is_easier else 1
    easier = sum(sign * value < sign * values[index] for value in values)
    equal = sum(value == values[index] for value in values)
    return easier + (equal + 1) / 2


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
    assert rank(values, higher_is_easier) == expected
    assert sum(rank(values, higher_is_easier)) == 30 * 31 / 2


def test_a_row_that_is_easier_in_both_signals_comes_first() -> None:
    records = [DifficultyRecord("hard", 0.1, 3.0, 2, ""), DifficultyRecord("easy", 0.9, 0.5, 2, "")]
    assert [example.example_id for example in fuse(records, 60)] == ["easy", "hard"]


@pytest.mark.parametrize("k", [60.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_fused_score_is_the_sum_of_reciprocal_ranks(seed: int, k: float) -> None:
    records = random_records(seed)
    rouges, entropies = [r.rouge_l for r in records], [r.cross_entropy for r in records]
    by_id = {example.example_id: example for example in fuse(records, k)}
    for index, record in enumerate(records):
        ranks = counted_rank(rouges, index, True), counted_rank(entropies, index, False)
        expected = 1 / (k + ranks[0]) + 1 / (k + ranks[1])
        example = by_id[record.example_id]
        assert (example.rouge_l, example.cross_entropy) == (record.rouge_l, record.cross_entropy)
        assert (example.rank_rouge_l, example.rank_cross_entropy) == ranks
        assert example.fused_score == pytest.approx(expected, abs=1e-15)


def test_the_ranking_goes_from_easy_to_hard_and_equal_scores_by_id() -> None:
    ranked = fuse(random_records(0), 60)
    keys = [(-example.fused_score, example.example_id) for example in ranked]
    assert keys == sorted(keys)
    assert len({key for key, _ in keys}) < len(keys)  # there are equal scores to be ordered


def test_the_order_of_the_records_does_not_matter() -> None:
    records = random_records(1)
    shuffled = random.Random(2).sample(records, len(records))
    assert fuse(records, 60) == fuse(shuffled, 60)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="cross_entropy: value 2 of 2 is"):
        fuse([DifficultyRecord("a", 0, 1, 1, ""), DifficultyRecord("b", 0, value, 1, "")], 60)


def test_the_share_of_ties_counts_rows_with_an_equal_one() -> None:
    records = [
        DifficultyRecord(str(index), [0, 0, 0, 1][index], index, 1, "") for index in range(4)
    ]
    assert tie_shares(records) == {"rouge_l": 0.75, "cross_entropy": 0.0}


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_has_its_fields_in_the_records(name: str) -> None:
    assert name in DifficultyRecord.__dataclass_fields__
    assert {name, f"rank_{name}"} <= set(RankedExample.__dataclass_fields__)
