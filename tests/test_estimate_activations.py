"""The bytes that `estimate` counts for a forward pass, against what autograd saves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pocl_dist.cluster.estimate.activations import activation_bytes
from pocl_dist.cluster.estimate.shapes import shape_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS, LENGTH = 2, 64


def modern(**keys: object) -> dict:
    """Returns sizes at which a layer's activations are far more than its small change."""
    return {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **keys,
    }  # fmt: skip


def gpt2(dropout: float) -> GPT2Config:
    return GPT2Config(
        vocab_size=512, n_embd=128, n_layer=3, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**modern()),
    "qwen2": Qwen2Config(**modern()),
    "qwen3": Qwen3Config(**modern(head_dim=32)),
    "gemma2": Gemma2Config(**modern(head_dim=32, query_pre_attn_scalar=32)),
    "opt": OPTConfig(
        vocab_size=512, hidden_size=128, ffn_dim=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, dropout=0.0, word_embed_proj_dim=128,
    ),
    "gpt2": gpt2(0.0),
    "gpt2 with dropout": gpt2(0.1),
}  # fmt: skip


def saved_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes that a forward pass of the backbone keeps, its result among them."""
    sys.path.insert(0, str(BENCHMARKS))
    from live_bytes import SavedBytes

    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 512
    model.train()
    with SavedBytes(model.parameters()) as saved:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    return saved.bytes + hidden.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_keeps_what_is_counted(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    shape = shape_of(json.loads(CONFIGS[name].to_json_string(use_diff=False)), name)
    counted = activation_bytes(
        shape, ROWS, LENGTH, dtype.itemsize, is_checkpointed=False, is_cpu=True
    )
    assert counted == pytest.approx(saved_bytes(model), rel=0.1)


def test_with_checkpointing_the_inputs_of_the_layers_are_kept() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = shape_of(json.loads(CONFIGS["llama"].to_json_string(use_diff=False)), "llama")
    counted = activation_bytes(shape, ROWS, LENGTH, 4, is_checkpointed=True, is_cpu=True)
    one = activation_bytes(shape, ROWS, LENGTH, 4, is_checkpointed=False, is_cpu=True) / 3
    kept = saved_bytes(model)
    # While it goes forward; the layer that backward computes again comes on top.
    assert kept < counted < kept + 1.1 * one
