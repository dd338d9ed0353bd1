"""Distillation over the families that the paper and the configs use, not only Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pocl_dist.config import load_config
from tests.oracle import Steps, assert_same_steps, plain_steps, train_all
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


def modern(size: int) -> dict:
    """Returns what the younger families share; heads of a size of their own."""
    return {
        "vocab_size": 320 + size, "hidden_size": size, "intermediate_size": 2 * size,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def bert(size: int) -> PretrainedConfig:
    # Between its backbone and its linear map stand a dense layer, an activation and a norm.
    return BertConfig(
        vocab_size=320 + size, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, is_decoder=True, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip


FAMILIES = {
    "gpt2": gpt2,
    "opt": opt,
    "llama": lambda size: LlamaConfig(**modern(size), tie_word_embeddings=True),
    "llama, untied": lambda size: LlamaConfig(**modern(size), tie_word_embeddings=False),
    "qwen2": qwen2,
    "qwen3": lambda size: Qwen3Config(**modern(size), head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda size: Gemma2Config(
        **modern(size), head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
    "gemma3": lambda size: Gemma3TextConfig(
        **modern(size), head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
    "cohere": lambda size: CohereConfig(**modern(size), logit_scale=0.25),
    "granite": lambda size: GraniteConfig(
        **modern(size), logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0,
        attention_multiplier=0.4,
    ),
    "phi": lambda size: PhiConfig(**modern(size)),  # its head has a bias
}  # fmt: skip
ONE_STAGE = {"num_stages": 1, "epochs_per_stage": 2, "temperature": 1.5, "kd_ratio": 0.7}
NUM_STEPS = 2


def write(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [gpt2, opt, qwen2, bert])
def test_a_family_takes_the_same_steps_on_two_ranks_under_zero_3_as_alone_without(
    family, tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    teacher = write(tmp_path / "teacher", family(32), 1)
    student = write(tmp_path / "student", family(16), 2)
    engine = {"micro_batch_size": 3, "global_batch_size": 8}
    loss = {"name": "jensen_shannon", "kwargs": {"student_weight": 0.5}}
    loss |= {"full_logits": family is bert}
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


Ran = dict[str, tuple[Steps | None, str]]


@pytest.fixture(scope="module")
def configs(
    tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Returns {family: config of a run}; `NAME, full logits` has the model's own logits."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for name, family in {**FAMILIES, "bert": bert}.items():
        models = [write(folder / f"{name}-{size}", family(size), size) for size in (32, 16)]
        loss = {"full_logits": name == "bert"}
        sections = {"curriculum": ONE_STAGE, "loss": loss}
        found[name] = write_config(folder / name, *models, tiny_pair[2], **sections)
    twin = "llama, full logits"
    models = [folder / f"llama-{size}" for size in (32, 16)]
    found["bert, not asked for"] = write_config(
        folder / "refused", *[folder / f"bert-{size}" for size in (32, 16)], tiny_pair[2],
        curriculum=ONE_STAGE,
    )  # fmt: skip
    found[twin] = write_config(
        folder / twin, *models, tiny_pair[2], curriculum=ONE_STAGE, loss={"full_logits": True}
    )
    return found


@pytest.fixture(scope="module")
def ran(configs: dict[str, Path]) -> Ran:
    """Returns the first steps of each config, by the train step of a real run under ZeRO-3."""
    return train_all(configs, NUM_STEPS)


def steps_of(ran: Ran, name: str) -> Steps:
    steps, error = ran[name]
    assert steps is not None, error
    return steps


@pytest.mark.parametrize("name", [*FAMILIES, "bert"])
def test_two_steps_from_hidden_states_are_those_of_the_models_own_logits(
    name: str, configs: dict[str, Path], ran: Ran
) -> None:
    # Teacher and student pad the vocabulary of one tokenizer to 352 and 336 rows (most families).
    wanted = plain_steps(load_config([configs[name]]), NUM_STEPS)
    found = steps_of(ran, name)
    assert_same_steps(found, wanted, 1e-4)
    assert wanted.losses[0] != wanted.losses[1]


def test_the_padding_of_a_vocabulary_gets_no_gradient_and_may_differ(ran: Ran) -> None:
    num_real = len(make_tokenizer())  # of 336 rows here, 352 in the teacher
    for gradients in steps_of(ran, "llama, untied").gradients:
        gradient_VH = torch.as_tensor(gradients["lm_head.weight"])
        assert gradient_VH.shape == (336, 16) and num_real < 336
        assert gradient_VH[:num_real].any() and not gradient_VH[num_real:].any()


def test_full_logits_take_the_steps_of_the_fused_loss(ran: Ran) -> None:
    assert_same_steps(steps_of(ran, "llama, full logits"), steps_of(ran, "llama"), 1e-5)


def test_a_head_that_is_no_linear_map_is_refused_by_name_unless_asked_for(ran: Ran) -> None:
    steps, error = ran["bert, not asked for"]
    assert steps is None
    assert "MismatchError: BertLMHeadModel: its logits are not a linear head" in error
    assert "loss.full_logits: true" in error
