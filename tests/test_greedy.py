"""One pass that answers and scores, against a loop without cache, batch or padding."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pocl_dist.data.encoding import collate
from pocl_dist.models import greedy
from pocl_dist.models.greedy import AnsweredRow, answer_and_score
from pocl_dist.models.prompt_cache import can_share_forward
from pocl_dist.records import EncodedExample
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
REAL = len(TOKENIZER)
NUM_NEW = 12
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {
    "vocab_size": REAL + 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, **IDS,
}  # fmt: skip
# A window of 10 is shorter than prompt and answer together.
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=REAL, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, **IDS
    ),
    "opt": OPTConfig(
        vocab_size=REAL, hidden_size=16, ffn_dim=32, word_embed_proj_dim=8, num_hidden_layers=2,
        num_attention_heads=2, init_std=0.3, **IDS,
    ),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=10),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, sliding_window=10, final_logit_softcapping=2.0,
        attn_implementation="eager",
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=10),
    "cohere": CohereConfig(**SMALL, logit_scale=0.5),
    "granite": GraniteConfig(**SMALL, logits_scaling=2.0),
    "mamba": MambaConfig(
        vocab_size=REAL, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3,
        **IDS,
    ),
}  # fmt: skip


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        # eos comes early in some rows: its logit is raised by a part of another token's.
        weight = model.get_output_embeddings().weight
        weight[0] = 0.6 * weight[17] + 0.6 * weight[40]
    return model


def examples(num_rows: int, prefix: int = 9) -> list[EncodedExample]:
    """Returns rows of uneven lengths that begin with the same `prefix` tokens, short to long."""
    draw = torch.Generator().manual_seed(num_rows)
    head = torch.randint(1, REAL, (prefix,), generator=draw).tolist()
    rows = []
    for index in range(num_rows):
        num_prompt, num_response = 1 + index % 5, 1 + index // 2
        rest = torch.randint(1, REAL, (num_prompt + num_response,), generator=draw).tolist()
        rows.append(EncodedExample(f"r{index}", (*head, *rest), prefix + num_prompt, False, False))
    return rows


def greedy_ids(model: PreTrainedModel, row: EncodedExample) -> list[int]:
    """The whole sequence anew for every token, one row, no eos."""
    ids = list(row.prompt_ids)
    with torch.no_grad():
        for _ in range(NUM_NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :REAL].argmax()))
    return ids[row.num_prompt_tokens :]


def token_by_token(model: PreTrainedModel, row: EncodedExample) -> tuple[str, float]:
    """The same without anything of ours: answer up to eos, and cross-entropy in float64."""
    ids = greedy_ids(model, row)
    ids = ids[: ids.index(0)] if 0 in ids else ids
    with torch.no_grad():
        logits_TV = model(torch.tensor([row.token_ids])).logits[0, :, :REAL].double()
    at = range(row.num_prompt_tokens - 1, len(row.token_ids) - 1)
    losses = [-logits_TV[t].log_softmax(-1)[row.token_ids[t + 1]] for t in at]
    text = TOKENIZER.decode(ids, skip_special_tokens=True).strip()
    return text, float(torch.stack(losses).mean())


def run(model: PreTrainedModel, rows: list[EncodedExample]) -> list[AnsweredRow]:
    return answer_and_score(model, TOKENIZER, rows, collate(rows, 0), NUM_NEW)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_and_scores_of_a_family_are_those_of_token_by_token(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "FORWARD_TOKENS", 70)  # several forwards, one of them ragged
    model, rows = make(name), examples(11)
    assert can_share_forward(model) == (name != "mamba")
    found = run(model, rows)
    lengths = set()
    for row, answered in zip(rows, found, strict=True):
        text, cross_entropy = token_by_token(model, row)
        assert answered.answer == text
        assert answered.cross_entropy == pytest.approx(cross_entropy, rel=1e-5)
        lengths.add(len(text))
    assert len(lengths) > 1


def test_rows_that_end_early_leave_and_the_others_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """eos is the token that about half of the rows say on their way."""
    model, rows = make("llama"), examples(16)
    alone_ids = [greedy_ids(model, row) for row in rows]
    num_rows_of = Counter(token for ids in alone_ids for token in set(ids[1:]))
    tokenizer = make_tokenizer()
    eos_id = min(num_rows_of, key=lambda token: (abs(num_rows_of[token] - 8), token))
    assert 4 < num_rows_of[eos_id] < 16
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    sizes = []
    forward = model.model.forward

    @functools.wraps(forward)
    def noted(*args: object, **kwargs: object) -> object:
        sizes.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", noted)
    found = answer_and_score(model, tokenizer, rows, collate(rows, 0), NUM_NEW)
    for ids, row in zip(alone_ids, found, strict=True):
        kept = ids[: ids.index(eos_id)] if eos_id in ids else ids
        assert row.answer == tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert sizes[:2] == [1, 16]  # the common prefix, then the rest
    assert sizes[-1] < 16, "no row has left"


@pytest.mark.parametrize("prefix", [0, 3, 30])
def test_a_common_beginning_of_any_length_changes_nothing(prefix: int) -> None:
    model, rows = make("llama"), examples(6, prefix)
    for row, answered in zip(rows, run(model, rows), strict=True):
        text, cross_entropy = token_by_token(model, row)
        assert (answered.answer, answered.cross_entropy) == (text, pytest.approx(cross_entropy))


def test_prompts_that_are_all_the_same_are_no_prefix_to_the_end() -> None:
    model = make("llama")
    row = examples(3)[2]
    rows = [replace(row, example_id=str(index)) for index in range(3)]
    assert len({answered.answer for answered in run(model, rows)}) == 1
    assert run(model, rows)[0].answer == token_by_token(model, row)[0]
