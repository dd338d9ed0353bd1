"""A part of a batch is padded, and drawn, as the whole batch is: its rows come out the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_dist.data.encoding import Encoder, collate
from pocl_dist.data.sources import read_rows
from pocl_dist.models import greedy
from pocl_dist.models.generation import Sampling, generate_answers, mean_cross_entropies
from pocl_dist.models.greedy import answer_and_score
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.records import EncodedExample
from pocl_dist.teacher.cache_worker import row_hiddens
from tests.fixtures_models import write_varied_rows

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, list[EncodedExample]]
PARTS = [(0, 1, 2, 3), (4, 5, 6, 7), (2,), (7,), (0, 5)]


@pytest.fixture(scope="module")
def loaded(
    tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor; and threads cost such a small model much time
    source = ModelFolder(tiny_pair[0], "teacher")
    tokenizer = load_tokenizer(source)
    encoder = Encoder(tokenizer, "short", 64, 48)
    train = write_varied_rows(tmp_path_factory.mktemp("rows") / "train.jsonl")
    rows = [encoder.encode(row) for row in read_rows(str(train), "data.train").examples][:8]
    rows.sort(key=lambda row: len(row.token_ids))
    yield load_model(source, torch.float32), tokenizer, rows
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("forward_tokens", [4096, 90])
def test_scores_and_greedy_answers_of_a_part_are_those_of_the_whole(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, forward_tokens: int
) -> None:
    model, tokenizer, rows = loaded
    monkeypatch.setattr(greedy, "FORWARD_TOKENS", forward_tokens)
    batch = collate(rows, 0)
    whole = answer_and_score(model, tokenizer, rows, batch, 8)
    assert len({row.answer for row in whole}) > 4
    for part in PARTS:
        found = answer_and_score(model, tokenizer, rows, batch, 8, part)
        assert [row.answer for row in found] == [whole[row].answer for row in part]
        # Not to the bit: a product of other height may take another kernel.
        assert [row.cross_entropy for row in found] == pytest.approx(
            [whole[row].cross_entropy for row in part], rel=1e-5
        )


def test_cross_entropies_and_hidden_states_of_a_part_are_those_of_the_whole(
    loaded: Loaded,
) -> None:
    model, tokenizer, rows = loaded
    batch = collate(rows, 0)
    whole = mean_cross_entropies(model, batch, len(tokenizer))
    hiddens = row_hiddens(model, batch, range(8))
    for part in PARTS:
        found = mean_cross_entropies(model, batch.only(part), len(tokenizer))
        assert found == pytest.approx([whole[row] for row in part], rel=1e-5)
        for row, hidden_NH in zip(part, row_hiddens(model, batch, part), strict=True):
            torch.testing.assert_close(hidden_NH, hiddens[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8),
        Sampling(8, do_sample=True, seed=3),
        Sampling(8, do_sample=True, temperature=1.7, top_p=0.8, no_repeat_ngram_size=2, seed=4),
    ],
)
def test_a_part_of_a_batch_draws_what_the_whole_would_have_drawn(
    loaded: Loaded, sampling: Sampling
) -> None:
    """The oracle is `generate` with its own sampling over the whole batch."""
    model, tokenizer, rows = loaded
    prompts = [row.prompt_ids for row in rows]
    whole = generate_answers(model, tokenizer, prompts, sampling)
    assert len(set(whole)) > 4
    for part in PARTS:
        found = generate_answers(model, tokenizer, prompts, sampling, part)
        assert found == [whole[row] for row in part]
