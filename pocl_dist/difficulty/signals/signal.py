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
    """What a signal may look at: the student, a batch of rows, and the student's greedy answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[EncodedExample]
    references: Sequence[Sequence[str]]
    answers: Sequence[str]


@dataclass(frozen=True)
class Signal:
    """One number per example; `name` is its field in DifficultyRecord."""

    name: str
    higher_is_easier: bool
    compute: Callable[[AnsweredBatch], list[float]]
