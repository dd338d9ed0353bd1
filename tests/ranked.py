"""The ranking of scored rows, row by row in plain Python: what the columns must come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.files import digest_of
from pocl_dist.records import DifficultyRecord


@dataclass(frozen=True)
class RankedExample:
    """A row of `difficulty/ranking.parquet`."""

    example_id: str
    rouge_l: float
    cross_entropy: float
    rank_rouge_l: float
    rank_cross_entropy: float
    fused_score: float


def counted_rank(values: Sequence[float], index: int, higher_is_easier: bool) -> float:
    """One more than the easier values, and half a place for each equal one."""
    sign = -1 if higher_is_easier else 1
    easier = sum(sign * value < sign * values[index] for value in values)
    equal = sum(value == values[index] for value in values)
    return easier + (equal + 1) / 2


def ranked(records: Sequence[DifficultyRecord], k: float) -> list[RankedExample]:
    """Returns the rows easy to hard, equal scores by id."""
    found = []
    for index, record in enumerate(records):
        values = {name: getattr(record, name) for name in SIGNALS}
        ranks = {
            f"rank_{name}": counted_rank(
                [getattr(other, name) for other in records], index, signal.higher_is_easier
            )
            for name, signal in SIGNALS.items()
        }
        fused_score = sum(1 / (k + rank) for rank in ranks.values())
        found.append(
            RankedExample(example_id=record.example_id, fused_score=fused_score, **values, **ranks)
        )
    return sorted(found, key=lambda example: (-example.fused_score, example.example_id))


def scores_digest(records: Sequence[DifficultyRecord]) -> str:
    """Returns the digest of scores whatever their order."""
    rows = sorted([record.example_id, record.rouge_l, record.cross_entropy] for record in records)
    return digest_of(rows)  # type: ignore[arg-type]


def as_json(examples: Sequence[RankedExample]) -> list[dict[str, object]]:
    """Returns rows as Parquet gives them."""
    return [asdict(example) for example in examples]
