"""Distillation over the families that the paper and the configs use, not only Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.tiny import make_tokenizer, write_config, write_llama
from tests.training import distill, step_rows


def gpt2(size: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=320, n_embd=size, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def opt(size: int) -> PretrainedConfig:
    # As in opt-350m: the embedding is narrower than the layers, and norms come last.
    return OPTConfig(
        vocab_size=320, hidden_size=size, word_embed_proj_dim=size // 2, ffn_dim=2 * size,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, dropout=0.0,
        do_layer_norm_before=False, init_std=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def qwen2(size: int) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=320 + size, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=size < 32, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def write(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [gpt2, opt, qwen2])
def test_a_family_takes_the_same_steps_on_two_ranks_under_zero_3_as_alone_without(
    family, tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    teacher = write(tmp_path / "teacher", family(32), 1)
    student = write(tmp_path / "student", family(16), 2)
    engine = {"micro_batch_size": 3, "global_batch_size": 8}
    loss = {"name": "jensen_shannon", "kwargs": {"student_weight": 0.5}}
    runs = [
        distill(
            write_config(
                tmp_path / str(stage), teacher, student, tiny_pair[2],
                engine={**engine, "zero_stage": stage}, loss=loss,
            ),
            world_size,
        )
        for stage, world_size in ((3, 2), (0, 1))
    ]  # fmt: skip
    first, second = (torch.tensor([row["loss"] for row in step_rows(run)]) for run in runs)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)
    assert first[-1] != first[0]


def test_an_untied_student_learns_from_a_tied_teacher(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    student = write_llama(tmp_path / "student", hidden=16, layers=1, seed=3, is_tied=False)
    run = distill(write_config(tmp_path / "run", tiny_pair[0], student, tiny_pair[2]), 2)
    reference = distill(
        write_config(
            tmp_path / "alone", tiny_pair[0], student, tiny_pair[2],
            engine={"zero_stage": 0, "micro_batch_size": 3, "global_batch_size": 8},
        ),
        1,
    )  # fmt: skip
    losses = [torch.tensor([row["loss"] for row in step_rows(r)]) for r in (run, reference)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-8)
