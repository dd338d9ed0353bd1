"""What a difficulty signal is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_dist.records import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnsweredBatch:
    """What a signal may look at: the student, a batch of rows, and what one pass over them gave."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[EncodedExample]
    references: Sequence[Sequence[str]]
    answers: Sequence[str]  # greedy
    cross_entropies: Sequence[float]  # mean of the reference's tokens, nats


@dataclass(frozen=True)
class Signal:
    """One number per example; `name` is its field in DifficultyRecord."""

    name: str
    higher_is_easier: bool
    compute: Callable[[AnsweredBatch], list[float]]
