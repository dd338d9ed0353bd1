"""Models: their heads, depth pruning, the checks before they are opened, and greedy answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    PreTrainedConfig,
    PreTrainedModel,
)

from pocl_dist.errors import ConfigError, MismatchError, MissingInputError, RefusedError
from pocl_dist.models.generation import Sampling, generate_answers
from pocl_dist.models.heads import backbone_module, check_head, head_logits, hidden_states, lm_head
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.pruning import prune_layers, write_pruned_student
from pocl_dist.models.sources import ModelFolder, find_model, model_digest
from pocl_dist.models.tokenizer_checks import check_same_tokenizer
from tests.tiny import make_tokenizer, write_llama

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "initializer_range": 0.3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama, tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=8, init_std=0.3),
    "opt, as wide": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3),
    "gemma2": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**LLAMA, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**LLAMA, logit_scale=0.3),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
    "phi": PhiConfig(**LLAMA),
}


def make(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


# --- heads


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_backbone_and_head_give_the_models_own_logits(name: str) -> None:
    model = make(CONFIGS[name])
    ids_BT = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    wanted = model(input_ids=ids_BT, attention_mask=mask_BT).logits[..., :55]
    hidden_BTH = hidden_states(backbone_module(model), ids_BT, mask_BT)
    head = lm_head(model, num_real_tokens=55)
    torch.testing.assert_close(head_logits(hidden_BTH, head), wanted, rtol=1e-5, atol=1e-5)
    assert (head.softcap == 2.0) == name.startswith("gemma")
    assert head.logit_scale == {"cohere": 0.3, "granite": 1 / 3}.get(name, 1.0)
    assert (head.bias_V is not None) == (name == "phi")
    check_head(model, num_real_tokens=55)


def test_a_head_that_does_more_than_the_linear_map_is_refused() -> None:
    model = make(CONFIGS["llama, tied"])
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.1)
    with pytest.raises(MismatchError, match="not a linear head"):
        check_head(model, num_real_tokens=60)


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = make(CONFIGS["llama, untied"])
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 60))
    with pytest.raises(MismatchError, match="the head is Sequential"):
        lm_head(model, num_real_tokens=60)
    bert = make(BertConfig(**SMALL, intermediate_size=32, is_decoder=True))
    with pytest.raises(MismatchError):  # a dense layer and a norm stand between backbone and head
        check_head(bert, num_real_tokens=60)


# --- depth pruning

DEEP = {
    "llama": LlamaConfig(**{**LLAMA, "num_hidden_layers": 5}),
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=5, n_head=2, initializer_range=0.3),
    "opt": OPTConfig(**{**SMALL, "num_hidden_layers": 5}, ffn_dim=32, word_embed_proj_dim=8),
    "gemma2": Gemma2Config(**{**LLAMA, "num_hidden_layers": 5}, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **{**LLAMA, "num_hidden_layers": 5}, head_dim=8, sliding_window_pattern=2
    ),
    "granite": GraniteConfig(**{**LLAMA, "num_hidden_layers": 5}, logits_scaling=3.0),
    "phi": PhiConfig(**{**LLAMA, "num_hidden_layers": 5}),
}


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_pruning_keeps_exactly_the_chosen_layers_and_all_the_rest(name: str) -> None:
    teacher = make(DEEP[name])
    student = prune_layers(teacher, [0, 2, 4])
    ids_BT = torch.arange(8)[None]
    states = teacher(input_ids=ids_BT, output_hidden_states=True).hidden_states
    assert student.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 5
    assert len(student(input_ids=ids_BT, output_hidden_states=True).hidden_states) == 4
    assert len(states) == 6
    mine, theirs = student.state_dict(), teacher.state_dict()
    renamed = {".1.": ".2.", ".2.": ".4."}
    for key, value in mine.items():
        old = next((key.replace(new, was, 1) for new, was in renamed.items() if new in key), key)
        assert torch.equal(value, theirs[old]), key
    layers = [key for key in theirs if any(f".{n}." in key for n in range(5))]
    assert len(theirs) - len(mine) == len(layers) * 2 // 5


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_a_student_that_keeps_all_layers_is_the_teacher(name: str) -> None:
    teacher = make(DEEP[name])
    student = prune_layers(teacher, range(5))
    ids_BT = torch.arange(8)[None]
    assert torch.equal(student(input_ids=ids_BT).logits, teacher(input_ids=ids_BT).logits)


def test_a_layer_that_the_teacher_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"init_layers: 5 is not allowed: .* layers 0\.\.4"):
        prune_layers(make(DEEP["llama"]), [0, 5])


def test_a_written_student_opens_with_the_teachers_tokenizer(tmp_path: Path) -> None:
    teacher = ModelFolder(write_llama(tmp_path / "teacher", hidden=16, layers=4, seed=5), "teacher")
    write_pruned_student(teacher, [1, 3], tmp_path / "student")
    student = find_model(str(tmp_path / "student"), "models.student.path")
    wanted = prune_layers(load_model(teacher, torch.float32), [1, 3]).state_dict()
    found = load_model(student, torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    check_same_tokenizer(load_tokenizer(teacher), load_tokenizer(student))
    assert model_digest(student) != model_digest(teacher)


# --- where a model lies


@pytest.fixture
def folder(tmp_path: Path, tiny_pair: tuple[Path, Path, Path]) -> Path:
    return Path(shutil.copytree(tiny_pair[1], tmp_path / "model"))


def _complaint(error: type[Exception], path: object, **options: bool) -> str:
    with pytest.raises(error) as caught:
        find_model(str(path), "models.student.path", **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith("models.student.path: ")
    return str(caught.value)


def test_a_model_that_is_not_there_is_told_with_key_and_path(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file.bin").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nothing": "does not exist (looked at /",
        "some/deep/where": "does not exist (looked at /",
        "x.gguf": "does not exist",
        tmp_path / "file.bin": "is a file but not GGUF",
        tmp_path / "empty": "has no config.json: not a model folder",
        "package:no_such_package/x": "the package 'no_such_package' is not installed",
        "package:pocl_dist/bundled/nobody": "holds no 'bundled/nobody'",
    }
    for path, reason in cases.items():
        assert reason in _complaint(MissingInputError, path)
    (folder / "config.json").write_text("{")
    assert "not readable JSON" in _complaint(MissingInputError, folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    assert "holds no .safetensors file" in _complaint(MissingInputError, folder)


def test_pickled_weights_and_code_of_a_model_are_refused(folder: Path) -> None:
    assert find_model(str(folder), "k").folder == folder
    (folder / "pytorch_model.bin").touch()
    assert find_model(str(folder), "k").folder == folder  # beside safetensors they are never opened
    (folder / "model.safetensors").unlink()
    assert "only pickled weights (pytorch_model.bin)" in _complaint(RefusedError, folder)
    (folder / "model.safetensors").touch()
    for name in ("config.json", "tokenizer_config.json"):
        before = (folder / name).read_text()
        settings = {**json.loads(before), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        (folder / name).write_text(json.dumps(settings))
        assert f"Python code of its own ({name})" in _complaint(RefusedError, folder)
        trusted = find_model(str(folder), "k", trust_remote_code=True)
        assert trusted.trust_remote_code
        (folder / name).write_text(before)


def test_weights_that_are_missing_or_damaged_are_told_and_never_filled_in(folder: Path) -> None:
    source = ModelFolder(folder, "mine")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    lacking = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(MissingInputError, match=r"lacks 3 weights .*layers\.1\.mlp\.down_proj"):
        load_model(source, torch.float32)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MissingInputError, match="no usable model"):
        load_model(source, torch.float32)
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody_knows_it"}))
    with pytest.raises(MissingInputError, match="no usable model"):
        load_model(source, torch.float32)


def test_the_digest_follows_config_and_weights_and_nothing_else(folder: Path) -> None:
    source = ModelFolder(folder, "mine")
    before = model_digest(source)
    (folder / "README.md").write_text("changed")
    assert model_digest(source) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    assert model_digest(source) != before


# --- tokenizers


def test_tokenizers_that_agree_pass_and_the_first_token_that_differs_is_named() -> None:
    check_same_tokenizer(make_tokenizer(), make_tokenizer())
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(
        MismatchError, match=r"token 'zebra' is id None and \d+\. White-box"
    ) as caught:
        check_same_tokenizer(make_tokenizer(), other)
    assert caught.value.exit_code == 78
    size = len(make_tokenizer())
    assert f"teacher {size} tokens, student {size + 1} tokens" in str(caught.value)


def test_tokenizers_of_one_size_that_number_tokens_otherwise_are_refused() -> None:
    one, two = make_tokenizer(), make_tokenizer()
    one.add_tokens(["aardvark", "zebra"])
    two.add_tokens(["zebra", "aardvark"])
    with pytest.raises(MismatchError, match="token 'aardvark' is id") as caught:
        check_same_tokenizer(one, two)
    assert "zebra" not in str(caught.value)  # the first is enough
    two = make_tokenizer()
    two.add_tokens(["aardvark", "zebra"])
    two.eos_token = "zebra"
    with pytest.raises(MismatchError, match=r"eos is id 0 and \d+"):
        check_same_tokenizer(one, two)


# --- answers


def test_left_padding_does_not_change_greedy_answers(tiny_pair: tuple[Path, Path, Path]) -> None:
    source = ModelFolder(tiny_pair[0], "teacher")
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    texts = ["say cat", "say the cat sat on a red mat and then it ran", "one", "far away from"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    greedy = Sampling(max_new_tokens=8)
    together = generate_answers(model, tokenizer, prompts, greedy)
    assert together == [generate_answers(model, tokenizer, [p], greedy)[0] for p in prompts]
    assert together == generate_answers(model, tokenizer, prompts, greedy)
    assert len(set(together)) > 1


def test_sampled_answers_follow_the_seed_and_leave_the_callers_random_state_alone(
    tiny_pair: tuple[Path, Path, Path],
) -> None:
    source = ModelFolder(tiny_pair[1], "student")
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    prompts = [tokenizer("say cat")["input_ids"]] * 4
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    drawn = [
        generate_answers(model, tokenizer, prompts, Sampling(8, do_sample=True, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), wanted)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_a_models_own_generation_defaults_do_not_reach_its_answers(
    tiny_pair: tuple[Path, Path, Path],
) -> None:
    source = ModelFolder(tiny_pair[1], "student")
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    prompts = [[5, 6, 7], [8, 9]]
    expected = generate_answers(model, tokenizer, prompts, Sampling(8))
    biased = load_model(source, torch.float32)
    biased.generation_config.repetition_penalty = 9.0
    biased.generation_config.min_new_tokens = 8
    assert generate_answers(biased, tokenizer, prompts, Sampling(8)) == expected
