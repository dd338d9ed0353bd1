"""Packed rows: the same losses and gradients as one example per row, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from pocl_dist.config import LossConfig
from pocl_dist.data.encoding import collate, collate_packed
from pocl_dist.errors import ConfigError
from pocl_dist.models.heads import backbone_module, hidden_states, lm_head
from pocl_dist.models.packing import check_packing
from pocl_dist.pipeline.student import StudentWithLoss
from pocl_dist.records import IGNORE_INDEX, Batch, EncodedExample, TeacherOutput
from tests.tiny import write_config
from tests.training import distill, step_rows

VOCABULARY = 64
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, object]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {**LLAMA, "sliding_window": 4},
}


def tiny_model(family: str, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, **MODELS.get(family, {}))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def example(index: int) -> EncodedExample:
    length = 6 + 3 * index
    ids = tuple((7 * index + 5 * k) % VOCABULARY for k in range(length))
    return EncodedExample(f"row-{index}", ids, 2 + index, False, False)


def loss_and_gradients(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch
) -> dict[str, torch.Tensor]:
    loss = LossConfig(name="jensen_shannon", kwargs={"student_weight": 0.5})
    module = StudentWithLoss(student, loss, VOCABULARY)
    module.temperature, module.kd_ratio = 2.0, 0.7
    arguments = (batch.input_ids_BT, None, batch.position_ids_BT)
    with torch.no_grad():
        hidden_BTH = hidden_states(backbone_module(teacher), *arguments)
    output = TeacherOutput(
        hidden_BTH[batch.labels_BT != IGNORE_INDEX], lm_head(teacher, VOCABULARY)
    )
    student.zero_grad()
    total, _ = module(
        batch.input_ids_BT, None, batch.labels_BT, output, position_ids_BT=batch.position_ids_BT
    )
    total.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    return {"loss": total.detach(), **gradients}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(
    family: str, attention: str
) -> None:
    student, teacher = tiny_model(family, 1, attention), tiny_model(family, 2, attention)
    check_packing(student, VOCABULARY)
    examples = [example(index) for index in range(5)]
    expected = loss_and_gradients(student, teacher, collate(examples, pad_id=0))
    for rows in ([[4, 0], [3, 1, 2]], [[0, 1, 2, 3, 4]], [[1, 0], [2], [4, 3]]):
        batch = collate_packed([[examples[i] for i in row] for row in rows], pad_id=0)
        found = loss_and_gradients(student, teacher, batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_labels_and_example_ids_of_a_packed_batch_stand_in_the_same_order() -> None:
    examples = [example(index) for index in range(4)]
    batch = collate_packed([[examples[2], examples[0]], [examples[3], examples[1]]], pad_id=9)
    assert batch.example_ids == ("row-2", "row-0", "row-3", "row-1")
    order = (2, 0, 3, 1)
    wanted = [t for i in order for t in examples[i].token_ids[examples[i].num_prompt_tokens :]]
    assert batch.labels_BT[batch.labels_BT != IGNORE_INDEX].tolist() == wanted
    assert batch.num_tokens == sum(len(item.token_ids) - 1 for item in examples)
    assert batch.num_label_tokens == sum(item.num_response_tokens for item in examples)
    assert batch.position_ids_BT is not None
    assert (batch.position_ids_BT == 0).sum() == 4 + 1  # examples, and the padding of one row
    dummy = collate_packed([], pad_id=9)
    assert dummy.num_tokens == dummy.num_label_tokens == 0


def test_a_model_that_cannot_keep_packed_examples_apart_is_refused_by_name() -> None:
    config = CONFIG_MAPPING["bloom"](vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ConfigError, match=r"engine\.packing.*BloomForCausalLM"):
        check_packing(AutoModelForCausalLM.from_config(config).eval(), VOCABULARY)
    config = CONFIG_MAPPING["mamba"](
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    with pytest.raises(ConfigError, match=r"engine\.packing.*MambaForCausalLM"):
        check_packing(AutoModelForCausalLM.from_config(config).eval(), VOCABULARY)


def test_a_model_whose_packed_examples_see_each_other_is_refused_by_what_it_computes() -> None:
    # OPT takes positions, but builds its causal mask without them.
    config = CONFIG_MAPPING["opt"](
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match=r"engine\.packing.*OPTForCausalLM.*see each other"):
        check_packing(AutoModelForCausalLM.from_config(config).eval(), VOCABULARY)


def test_a_run_with_packing_on_two_ranks_has_the_losses_of_one_rank_without(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plain = step_rows(distill(write_config(tmp_path / "plain", *tiny_pair), 1))
    engine = {"packing": True, "micro_batch_size": 3, "global_batch_size": 8}
    packed = step_rows(distill(write_config(tmp_path / "packed", *tiny_pair, engine=engine), 2))
    for ours, theirs in zip(packed, plain, strict=True):
        for key in ("loss", "kd_loss", "ce_loss", "kl", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7)
    assert max(row["padding_share"] for row in packed) <= 0.02
    assert sum(row["num_tokens"] for row in packed) == sum(row["num_tokens"] for row in plain)
