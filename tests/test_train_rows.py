"""Rows that are encoded when a step asks for them: what encoding all of them first would give."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from pocl_dist.data.encoding import Encoder
from pocl_dist.data.row_index import index_rows
from pocl_dist.data.sources import RowPolicy, Rows
from pocl_dist.distributed.process_group import join_process_group
from pocl_dist.errors import DataError
from pocl_dist.models.loading import load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline import train_rows
from pocl_dist.pipeline.train_rows import EncodedRows, check_rows
from pocl_dist.records import EncodedExample, Example
from tests.fixtures_models import write_varied_rows
from tests.ranks import run_ranks_with_errors

REFUSED = "row 'row-003': the chat template refuses its messages"
STUDENT = Path(train_rows.__file__).parents[1] / "bundled" / "student"


def encoder() -> Encoder:
    return Encoder(load_tokenizer(ModelFolder(STUDENT, "student")), "short", 32, 20)


def rows_of(folder: Path) -> Rows:
    path = write_varied_rows(folder / "train.jsonl")
    return index_rows(str(path), "data.train", folder / "index", RowPolicy())


@pytest.mark.parametrize("kept_bytes", [0, 3000, 1 << 20])
def test_rows_are_as_if_all_had_been_encoded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(train_rows, "KEPT_BYTES", kept_bytes)
    rows = rows_of(tmp_path)
    all_rows = [encoder().encode(example) for example in rows.examples]
    places = np.random.default_rng(4).permutation(len(all_rows))[:20].astype(np.int32)
    examples = EncodedRows(rows, encoder(), places)
    for _ in range(2):
        assert list(examples) == [all_rows[place] for place in places]
    assert (len(examples), examples.num_rows) == (20, 24)
    assert examples[3:5] == [all_rows[place] for place in places[3:5]]
    assert examples.row(7) == all_rows[7]
    asked = len({7, *places.tolist()})
    assert len(examples._kept) == min(asked, {0: 0, 3000: 5}.get(kept_bytes, asked))
    named = {row.example_id: row for row in all_rows[5:9]}
    assert examples.of_ids([*named, *named]) == named


class RefusesARow(Encoder):
    """An encoder with a template that refuses one row."""

    def encode(self, example: Example) -> EncodedExample:
        """Encodes, or not."""
        if example.example_id == "row-003":
            raise DataError(REFUSED)
        return super().encode(example)


def _check(folder: str, refuses: bool) -> tuple[int, str]:
    rank = join_process_group(60)
    rows = index_rows(f"{folder}/train.jsonl", "data.train", Path(folder) / "index", RowPolicy())
    kind = RefusesARow if refuses else Encoder
    chosen = kind(encoder().tokenizer, "short", 20, 13)
    examples = EncodedRows(rows, chosen, np.arange(24, dtype=np.int32))
    with contextlib.redirect_stdout(io.StringIO()) as told:
        check_rows(examples, rank)
    return len(examples._kept), told.getvalue()


def test_ranks_check_a_share_each_and_all_of_them_hear_of_a_bad_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    cut = [Encoder(encoder().tokenizer, "short", 20, 13).encode(row) for row in rows.examples]
    num_prompts = sum(row.is_prompt_cut for row in cut)
    num_responses = sum(row.is_response_cut for row in cut)
    assert 0 < num_prompts < 24 and 0 < num_responses < 24
    told = f"train: {num_prompts} prompts and {num_responses} responses cut, of 24 rows\n"
    assert run_ranks_with_errors(_check, 2, str(tmp_path), False) == [
        ((12, told), None),
        ((12, ""), None),
    ]
    for _, error in run_ranks_with_errors(_check, 2, str(tmp_path), True):
        assert error[:2] == ("DataError", REFUSED)
