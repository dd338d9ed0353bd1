"""The training rows of a rank, tokenised when a step asks for them; what fits stays in memory.

A visit costs a fraction of a millisecond of the tokenizer's time beside a step's forward and
backward, and a rank's memory does not grow with the number of rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np

from pocl_dist.data.columns import is_in, text_array
from pocl_dist.data.sources import Rows
from pocl_dist.display.output import say
from pocl_dist.distributed.collectives import gather_ints, gather_texts
from pocl_dist.errors import PoclError, error_of
from pocl_dist.records import EncodedExample

if TYPE_CHECKING:
    from pocl_dist.data.encoding import Encoder
    from pocl_dist.distributed.process_group import Rank

KEPT_BYTES = 64 << 20
"""Tokens that a rank keeps: of the rows that it meets first, to be met again in each epoch."""
_ROW_BYTES = 600  # of a kept row besides its tokens, as Python counts


@dataclass(frozen=True)
class _Kept:
    """An encoded row, its tokens as 32-bit numbers: an eighth of what Python's take."""

    example: EncodedExample  # without tokens
    token_ids: array[int]


class EncodedRows(Sequence[EncodedExample]):
    """The rows of a source in the order of `places`, encoded on demand."""

    def __init__(self, rows: Rows, encoder: Encoder, places: np.ndarray) -> None:
        self.rows = rows
        self._encoder = encoder
        self.places = places
        self._kept: dict[int, _Kept] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> EncodedExample: ...

    @overload
    def __getitem__(self, place: slice) -> list[EncodedExample]: ...

    def __getitem__(self, place: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(place, slice):
            return [self.row(row) for row in self.places[place].tolist()]
        return self.row(int(self.places[place]))

    @property
    def num_rows(self) -> int:
        """Returns the rows of the source, those without a place among them."""
        return len(self.rows.examples)

    def row(self, row: int) -> EncodedExample:
        """Returns a row by its place in the source."""
        kept = self._kept.get(row)
        if kept is not None:
            return replace(kept.example, token_ids=tuple(kept.token_ids))
        example = self._encoder.encode(self.rows.examples[row])
        if self._num_bytes < KEPT_BYTES:
            self._kept[row] = _Kept(replace(example, token_ids=()), array("i", example.token_ids))
            self._num_bytes += 4 * len(example.token_ids) + _ROW_BYTES
        return example

    def of_ids(self, names: Iterable[str]) -> dict[str, EncodedExample]:
        """Returns {example id: its row} of a few rows; reads all ids once."""
        ids = self.rows.ids()
        places = np.flatnonzero(is_in(ids, text_array(set(names))))
        return {example.example_id: example for example in map(self.row, places.tolist())}


def check_rows(examples: EncodedRows, rank: Rank) -> None:
    """Encodes every row of the source, each rank its share; rank 0 tells how many are cut.

    Collective. What a rank finds wrong with a row is raised on all of them.
    """
    num_prompts = num_responses = 0
    problem = ""
    try:
        for row in range(rank.index, examples.num_rows, rank.world_size):
            example = examples.row(row)
            num_prompts += example.is_prompt_cut
            num_responses += example.is_response_cut
    except PoclError as error:
        problem = json.dumps([error.exit_code, str(error)])
    problems = [text for text in gather_texts(problem, rank) if text.strip()]
    if problems:
        code, reason = json.loads(problems[0])
        error_of_row = error_of(code, reason)
        assert error_of_row is not None, "it came from an error with that code"
        raise error_of_row
    counts = gather_ints([num_prompts, num_responses], rank)
    num_prompts, num_responses = (sum(column) for column in zip(*counts, strict=True))
    if rank.is_main and num_prompts + num_responses:
        say(
            f"train: {num_prompts} prompts and {num_responses} responses cut, "
            f"of {examples.num_rows} rows"
        )
