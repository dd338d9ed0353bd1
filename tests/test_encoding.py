"""Template, tokens and the one label mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pocl_dist.data.encoding import Encoder, collate, pad_id_of, shift_labels
from pocl_dist.errors import ConfigError, DataError, MismatchError
from pocl_dist.models.generation import mean_cross_entropies
from pocl_dist.records import IGNORE_INDEX, Example
from tests.tiny import make_tokenizer, write_llama

# As in the released code and in Alpaca's (tatsu-lab/stanford_alpaca, PROMPT_DICT).
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nsay cat\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nsay cat\n\n### Input:\ntwice\n\n### Response:\n"
)
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CAT = Example("cat", "say cat", "", ("cat",))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def encoder_of(
    tokenizer: PreTrainedTokenizerFast,
    template: str = "short",
    max_tokens: int = 64,
    max_prompt: int = 48,
) -> Encoder:
    return Encoder(tokenizer, template, max_tokens, max_prompt)


def text_of(encoder: Encoder, example: Example) -> str:
    """Returns the prompt that the model sees."""
    return str(encoder.tokenizer.decode(encoder.encode_prompt(example)[0]))


# --- templates


def test_the_alpaca_template_is_the_published_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, "alpaca", 512, 256)
    assert text_of(encoder, CAT) == ALPACA
    assert text_of(encoder, replace(CAT, context="twice")) == ALPACA_WITH_INPUT


def test_short_and_own_templates_put_the_context_on_a_line_of_its_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    twice = replace(CAT, context="twice")
    short = encoder_of(tokenizer)
    assert text_of(short, CAT) == "### Instruction:\nsay cat\n\n### Response:\n"
    assert text_of(short, twice) == "### Instruction:\nsay cat\ntwice\n\n### Response:\n"
    assert text_of(encoder_of(tokenizer, "Q: {prompt}\nA:"), twice) == "Q: say cat\ntwice\nA:"


def test_earlier_messages_stand_before_the_prompt_also_without_a_chat_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = replace(CAT, history=(("user", "one"), ("assistant", "two")))
    assert text_of(encoder_of(tokenizer, "{prompt}>"), example) == "one\n\ntwo\n\nsay cat>"


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_chat_template_is_the_tokenizers_own(chat: PreTrainedTokenizerFast) -> None:
    example = replace(CAT, history=(("system", "be kind"), ("user", "one"), ("assistant", "two")))
    wanted = (
        "<system>be kind</system>\n<user>one</user>\n<assistant>two</assistant>\n"
        "<user>say cat</user>\n<assistant>"
    )
    assert text_of(encoder_of(chat, "chat", 512, 256), example) == wanted
    messages = [{"role": role, "content": text} for role, text in example.history]
    messages.append({"role": "user", "content": "say cat"})
    assert chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == wanted


def test_a_question_that_occurs_in_the_template_too_changes_nothing(
    chat: PreTrainedTokenizerFast,
) -> None:
    encoder = encoder_of(chat, "chat", 512, 256)
    for question in ("assistant", "user", "a", ">"):
        wanted = f"<user>{question}</user>\n<assistant>"
        assert text_of(encoder, replace(CAT, prompt=question)) == wanted


def test_what_cannot_be_encoded_at_all_is_told_before_any_row(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match=r"data\.template: 'chat' is not possible"):
        encoder_of(tokenizer, "chat")
    without_eos = make_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(MismatchError, match="no eos token"):
        encoder_of(without_eos)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: 5 leaves no room"):
        encoder_of(tokenizer, max_prompt=5).encode(CAT)


def test_messages_that_the_chat_template_refuses_are_a_data_error_with_the_row(
    chat: PreTrainedTokenizerFast,
) -> None:
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 'cat': .*roles must alternate"):
        encoder_of(chat, "chat").encode(CAT)


# --- labels


def test_labels_are_shifted_once_and_only_the_response_and_eos_are_learnt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = encoder_of(tokenizer).encode(CAT)
    response = [*tokenizer("cat")["input_ids"], tokenizer.eos_token_id]
    prompt = tokenizer("### Instruction:\nsay cat\n\n### Response:\n")["input_ids"]
    assert list(example.token_ids) == prompt + response
    assert list(example.prompt_ids) == prompt
    assert example.num_response_tokens == len(response)
    inputs, labels = shift_labels(example.token_ids, example.num_prompt_tokens)
    assert inputs == prompt + response[:-1]
    assert labels == [IGNORE_INDEX] * (len(prompt) - 1) + response
    assert all(labels[t] in (IGNORE_INDEX, example.token_ids[t + 1]) for t in range(len(labels)))


def test_eos_is_learnt_although_padding_has_the_same_id(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == pad_id_of(tokenizer)
    encoder = encoder_of(tokenizer)
    rows = [
        encoder.encode(replace(CAT, references=(text,))) for text in ("cat", "the cat sat on a mat")
    ]
    batch = collate(rows, pad_id_of(tokenizer))
    assert ((batch.labels_BT == tokenizer.eos_token_id).sum(dim=1) == 1).all()
    assert batch.num_label_tokens == sum(row.num_response_tokens for row in rows)
    assert batch.num_tokens == int(batch.attention_mask_BT.sum())
    assert (batch.labels_BT[batch.attention_mask_BT == 0] == IGNORE_INDEX).all()


def test_a_tokenizer_without_padding_pads_with_eos() -> None:
    bare = make_tokenizer()
    bare.pad_token = None
    assert pad_id_of(bare) == bare.eos_token_id


# --- cutting


def test_a_long_prompt_loses_its_beginning_and_keeps_head_and_response_marker(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    words = [f"{n}" for n in range(100)]
    encoder = encoder_of(tokenizer, max_tokens=64, max_prompt=40)
    encoded = encoder.encode(replace(CAT, prompt=" ".join(words)))
    text = tokenizer.decode(encoded.prompt_ids)
    assert encoded.is_prompt_cut and not encoded.is_response_cut
    assert encoded.num_prompt_tokens == 40
    assert text.startswith("### Instruction:\n") and text.endswith(" 98 99\n\n### Response:\n")
    assert not encoder.encode(CAT).is_prompt_cut


def test_a_prompt_of_exactly_the_bound_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(encoder_of(tokenizer).encode(CAT).prompt_ids)
    assert not encoder_of(tokenizer, max_prompt=length).encode(CAT).is_prompt_cut
    assert encoder_of(tokenizer, max_prompt=length - 1).encode(CAT).is_prompt_cut


def test_a_long_response_loses_its_end_and_with_it_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    example = replace(CAT, references=("cat " * 100,))
    encoded = encoder_of(tokenizer, max_tokens=64).encode(example)
    assert encoded.is_response_cut and len(encoded.token_ids) == 64
    assert tokenizer.eos_token_id not in encoded.token_ids
    whole = encoder_of(tokenizer, max_tokens=1000).encode(example)
    assert encoded.token_ids == whole.token_ids[:64] and not whole.is_response_cut
    exact = encoder_of(tokenizer, max_tokens=len(whole.token_ids)).encode(example)
    assert exact == whole


def test_the_oldest_turns_of_a_long_conversation_are_dropped_first(
    chat: PreTrainedTokenizerFast,
) -> None:
    turns: list[tuple[str, str]] = [("system", "kind")]
    for number in range(50):
        turns += [("user", f"question {number}"), ("assistant", f"answer {number}")]
    encoder = encoder_of(chat, "chat", 512, 150)
    ids, is_cut = encoder.encode_prompt(replace(CAT, history=tuple(turns)))
    text = str(chat.decode(ids))
    assert is_cut and len(ids) <= 150
    assert text.startswith("<system>kind</system>\n<user>question ")
    assert text.endswith("answer 49</assistant>\n<user>say cat</user>\n<assistant>")
    assert "question 0<" not in text


def test_without_room_for_any_turn_the_question_remains(chat: PreTrainedTokenizerFast) -> None:
    history = (("system", "word " * 200), ("user", "old " * 200), ("assistant", "a"))
    ids, is_cut = encoder_of(chat, "chat", 64, 48).encode_prompt(replace(CAT, history=history))
    assert is_cut and chat.decode(ids) == "<user>say cat</user>\n<assistant>"


# --- batches


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = write_llama(tmp_path_factory.mktemp("llama"), hidden=16, layers=2, seed=3)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def test_padding_never_changes_the_loss_of_a_row(
    tokenizer: PreTrainedTokenizerFast, llama: PreTrainedModel
) -> None:
    encoder = encoder_of(tokenizer)
    responses = [
        "cat",
        "the cat sat on a red mat",
        "one big dog under two old trees and then it ran far",
    ]
    rows = [encoder.encode(replace(CAT, references=(text,))) for text in responses]
    together = mean_cross_entropies(llama, collate(rows, pad_id_of(tokenizer)), len(tokenizer))
    alone = [
        mean_cross_entropies(llama, collate([row], pad_id_of(tokenizer)), len(tokenizer))[0]
        for row in rows
    ]
    by_transformers = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        labels = ids.clone()
        labels[0, : row.num_prompt_tokens] = IGNORE_INDEX
        by_transformers.append(llama(input_ids=ids, labels=labels).loss.item())
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx(by_transformers, abs=1e-6)
    other_pad = mean_cross_entropies(llama, collate(rows, pad_id=7), len(tokenizer))
    assert other_pad == pytest.approx(together, abs=1e-6)


def test_a_batch_without_rows_is_one_masked_token(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([], pad_id_of(tokenizer))
    assert batch.input_ids_BT.shape == batch.attention_mask_BT.shape == (1, 1)
    assert batch.num_label_tokens == 0 and batch.num_tokens == 0
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.long
