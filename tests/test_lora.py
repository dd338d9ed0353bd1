"""LoRA students: what is trained, what is saved, what is exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from pocl_dist.config import LoRAConfig, load_config
from pocl_dist.errors import ConfigError
from pocl_dist.files import read_json_lines
from pocl_dist.models.loading import load_model
from pocl_dist.models.lora import add_lora, merge_lora, target_names
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.preflight import check_inputs
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.oracle import Steps, assert_same_steps, plain_steps, train_all
from tests.tiny import write_config
from tests.training import checkpoint_tensors, distill, step_rows

SMALL = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32, initializer_range=0.3),
    "gpt2": GPT2Config(**SMALL, n_embd=16, initializer_range=0.3),  # its layers are transposed
}
LORA = {"rank": 3, "alpha": 12.0, "target_modules": ["q_proj", "down_proj"]}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model


# --- adapters in a model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_merged_weights_give_the_logits_of_the_adapters_beside_them(name: str) -> None:
    model, ids_BT = make(name), torch.arange(9)[None]
    names = list(dict(model.named_parameters()))
    before = model(input_ids=ids_BT).logits
    add_lora(model, LoRAConfig(rank=4), seed=7)
    assert torch.equal(model(input_ids=ids_BT).logits, before)  # B is 0
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    num_targets = {"llama": 14, "gpt2": 8}[name]
    assert len(trained) == 2 * num_targets
    for value in trained.values():
        value.add_(torch.randn_like(value) * 0.1)
    adapted = model(input_ids=ids_BT).logits
    assert float((adapted - before).abs().max()) > 1e-2
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=ids_BT).logits, adapted, rtol=1e-5, atol=1e-5)
    assert list(dict(model.named_parameters())) == names


def test_adapters_follow_the_seed_and_leave_the_callers_random_state_alone() -> None:
    models = [make("llama") for _ in range(3)]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LoRAConfig(rank=4), seed)
    assert torch.equal(torch.rand(3), wanted)
    key = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    first, same, other = (model.get_parameter(key) for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_targets_are_ends_of_names_and_never_the_head() -> None:
    llama = make("llama")
    found = target_names(llama, LoRAConfig(target_modules=["layers.1.self_attn.q_proj"]))
    assert found == ["model.layers.1.self_attn.q_proj"]
    assert not [n for n in target_names(llama, LoRAConfig()) if "lm_head" in n or "embed" in n]
    for target in ("lm_head", "embed_tokens", "self_attn", "roj", "input_layernorm"):
        with pytest.raises(ConfigError, match=rf"{target}.*is not allowed: .* q_proj, k_proj"):
            target_names(llama, LoRAConfig(target_modules=["q_proj", target]))


def test_a_wrong_target_is_known_before_any_weight_is_read(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    student = {"path": str(tiny_pair[1]), "lora": {"target_modules": ["lm_head"]}}
    models = {"teacher": None, "student": student}
    config = load_config([write_config(tmp_path, *tiny_pair, models=models)])
    with pytest.raises(ConfigError, match=r"models.student.lora.target_modules: 'lm_head'"):
        check_inputs(config, RunDirectory(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"models.student.lora.rank: 0 is not allowed"):
        load_config([tmp_path / "config.yaml"], ["models.student.lora.rank=0"])


# --- training


@dataclass
class Ran:
    """First steps by ZeRO stage, and those of a plain loop that trains all weights."""

    by_stage: dict[int, Steps]
    plain: Steps
    adapters: dict[str, torch.Tensor]  # as they start


@pytest.fixture(scope="module")
def ran(tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("lora")
    models = {
        "teacher": {"path": str(tiny_pair[0])},
        "student": {"path": str(tiny_pair[1]), "lora": LORA},
    }
    curriculum = {"num_stages": 1, "epochs_per_stage": 2, "temperature": 1.5, "kd_ratio": 0.7}
    configs = {
        str(stage): write_config(
            folder / str(stage), *tiny_pair, models=models, curriculum=curriculum,
            engine={"zero_stage": stage, "gradient_checkpointing": stage == 2},
            optimizer={"learning_rate": 0.05},
        )
        for stage in range(4)
    }  # fmt: skip
    found = train_all(configs, 3)
    for steps, error in found.values():
        assert steps is not None, error
    student = load_model(ModelFolder(tiny_pair[1], "student"), torch.float32)
    add_lora(student, LoRAConfig(**LORA), seed=42)  # type: ignore[arg-type]
    adapters = {n: p.detach().double() for n, p in student.named_parameters() if "lora_" in n}
    plain = plain_steps(load_config([configs["3"]]), 1)
    return Ran({int(stage): steps for stage, (steps, _) in found.items()}, plain, adapters)  # type: ignore[misc]


def test_the_first_gradient_is_that_of_the_weights_through_the_adapter(ran: Ran) -> None:
    # W + s B A with B = 0: dL/dB = s dL/dW A^T and dL/dA = 0
    found = ran.by_stage[3].gradients[0]
    assert set(found) == set(ran.adapters)
    assert ran.by_stage[3].losses[0] == pytest.approx(ran.plain.losses[0], rel=1e-5)
    for name, a in ran.adapters.items():
        if "lora_A" not in name:
            continue
        weight = ran.plain.gradients[0][name.replace(".lora_A.default", "")]
        wanted = 12.0 / 3 * weight @ a.T
        gradient = torch.as_tensor(found[name.replace("lora_A", "lora_B")])
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
        assert not torch.as_tensor(found[name]).any()
        assert torch.as_tensor(ran.by_stage[3].gradients[1][name]).any()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_trains_adapters_as_stage_3_does(ran: Ran, stage: int) -> None:
    assert_same_steps(ran.by_stage[stage], ran.by_stage[3], 1e-3)
    assert len(set(ran.by_stage[3].losses)) == 3


def test_a_lora_run_resumes_bit_for_bit_and_exports_a_plain_model(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    models = {
        "teacher": {"path": str(tiny_pair[0])},
        "student": {"path": str(tiny_pair[1]), "lora": {**LORA, "dropout": 0.1}},
    }
    sections = {
        "models": models,
        "dev": {"metric": "loss"},
        "data": {"dev": str(tiny_pair[2])},
        "curriculum": {"epochs_per_stage": 1},
        "optimizer": {"learning_rate": 0.05},
    }
    config = write_config(tmp_path / "whole", *tiny_pair, **sections)
    whole = distill(config, 2)
    other = write_config(tmp_path / "parts", *tiny_pair, **sections)
    distill(other, 2, stop_after=4)  # of 5 steps
    parts = distill(other, 2)
    saved, again = checkpoint_tensors(whole), checkpoint_tensors(parts)
    assert all("lora_" in name for name in saved)  # the base model is not saved again and again
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    losses = [[row["loss"] for row in step_rows(run)] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    exported = load_model(ModelFolder(whole.export, "export"), torch.float32)
    base = dict(load_model(ModelFolder(tiny_pair[1], "student"), torch.float32).named_parameters())
    assert set(base) == set(dict(exported.named_parameters()))
    for name, value in exported.named_parameters():
        stem = f"weights.model.{name.removesuffix('.weight')}"
        wanted = base[name].detach()
        if f"{stem}.lora_A.default.weight" in saved:
            a, b = (saved[f"{stem}.lora_{x}.default.weight"] for x in "AB")
            wanted = wanted + 4.0 * b @ a
            assert float((wanted - base[name].detach()).abs().max()) > 1e-3
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-6, atol=1e-6)
    # What dev saw in training is what was exported.
    dev = [row["value"] for row in read_json_lines(whole.metrics) if row["kind"] == "dev"]
    assert dev[-1] == pytest.approx(_dev_loss(exported, tiny_pair), rel=1e-5)
    assert "LoRA of rank 3 (merged)" in (whole.export / "README.md").read_text()


def _dev_loss(model: PreTrainedModel, pair: tuple[Path, Path, Path]) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    total, count = 0.0, 0
    for line in pair[2].read_text().splitlines():
        row = json.loads(line)
        text = f"### Instruction:\n{row['instruction']}\n\n### Response:\n"
        prompt = tokenizer(text)["input_ids"]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logits = logits[:, : len(tokenizer)]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        total, count = total + float(loss), count + len(answer)
    return total / count
