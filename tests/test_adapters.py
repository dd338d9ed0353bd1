"""Adapters that others trained: merged once, told apart by content, refused if they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pocl_dist.config import load_config
from pocl_dist.errors import ConfigError, MismatchError, MissingInputError, RefusedError
from pocl_dist.models.adapters import WEIGHTS, find_adapter, merge_adapter
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder, cache_folder, find_model, model_digest
from pocl_dist.pipeline.inputs import student_source, teacher_source
from pocl_dist.pipeline.preflight import check_inputs
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.oracle import assert_same_steps, train_all
from tests.tiny import results_in, write_config, write_llama

KEY = "models.teacher.adapter"
Pair = tuple[Path, Path, Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCL_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_adapter(folder: Path, base: Path, seed: int = 3, **settings: object) -> Path:
    """Trains nothing: writes an adapter of large random numbers, with peft itself."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def merge(base: Path, adapter: Path) -> ModelFolder:
    return merge_adapter(find_model(str(base), KEY), find_adapter(str(adapter), KEY), KEY)


def left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.glob("*") if not path.name.startswith(".lock-")]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"modules_to_save": ["norm"]},
    ],
    ids=["lora", "dora", "rslora, all", "a module of its own"],
)
@torch.no_grad()
def test_the_merged_folder_gives_the_logits_of_peft(
    tiny_pair: Pair, cache: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[0], **settings)
    merged = merge(tiny_pair[0], adapter)
    ids_BT = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
    before = base(ids_BT).logits
    wanted = PeftModel.from_pretrained(base, adapter).eval()(ids_BT).logits
    assert float((wanted - before).abs().max()) > 0.05
    found = load_model(merged, torch.float32)(ids_BT).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(load_tokenizer(merged)) == len(load_tokenizer(ModelFolder(tiny_pair[0], "base")))
    assert left_in(cache) == [merged.folder.name]


def test_another_adapter_at_the_same_path_is_another_model(
    tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[0])
    first = merge(tiny_pair[0], adapter)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert merge(tiny_pair[0], adapter) == first  # made once
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(adapter)
    write_adapter(adapter, tiny_pair[0], seed=4)
    second = merge(tiny_pair[0], adapter)
    assert second.folder != first.folder
    assert model_digest(second) != model_digest(first)
    # Also where weights are too large to be hashed whole: the adapter's digest is part of it.
    same_files = ModelFolder(first.folder, first.origin, adapter_digest=second.adapter_digest)
    assert model_digest(same_files) != model_digest(first)


def drop_a_tensor(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    del weights[min(weights)]
    save_file(weights, adapter / WEIGHTS)


def add_a_tensor(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    key = next(key for key in weights if ".layers.1." in key)
    save_file(
        {**weights, key.replace(".layers.1.", ".layers.9."): weights[key].clone()},
        adapter / WEIGHTS,
    )


def make_not_finite(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    weights[min(weights)].fill_(float("nan"))
    save_file(weights, adapter / WEIGHTS)


def name_a_module_that_is_not_there(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["c_attn"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def be_of_another_type(adapter: Path) -> None:
    PrefixTuningConfig(num_virtual_tokens=2).save_pretrained(adapter)


def name_code(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["megatron_config"] = {"a": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_a_tensor, MismatchError, "has no weights for 1 modules"),
        (add_a_tensor, MismatchError, r"unknown 1 modules \(first: .*layers.9"),
        (make_not_finite, MismatchError, "cannot be merged"),
        (name_a_module_that_is_not_there, MismatchError, "c_attn"),
        (be_of_another_type, MismatchError, "of type PREFIX_TUNING; only LORA"),
        (name_code, RefusedError, "megatron_config"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left(  # type: ignore[no-untyped-def]
    damage, error, message: str, tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[0])
    damage(adapter)
    with pytest.raises(error, match=message) as caught:
        merge(tiny_pair[0], adapter)
    assert str(caught.value).startswith(KEY) and left_in(cache) == []


def test_an_adapter_of_another_base_is_refused_with_the_shapes(
    tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[1])  # 16 wide, the teacher 32
    with pytest.raises(MismatchError, match=r"does not fit LlamaForCausalLM: .*size mismatch"):
        merge(tiny_pair[0], adapter)
    deep = write_llama(tmp_path / "deep", hidden=32, layers=3, seed=1, num_phantom=8)
    adapter = write_adapter(tmp_path / "other", deep)
    with pytest.raises(MismatchError, match=r"has weights for unknown .*layers\.2"):
        merge(tiny_pair[0], adapter)
    assert left_in(cache) == []


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning")
def test_an_adapter_of_a_tied_head_cannot_be_merged(
    tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[0], target_modules=["lm_head"])
    with pytest.raises(MismatchError, match="tied embedding"):
        merge(tiny_pair[0], adapter)
    assert left_in(cache) == []


def test_an_adapter_that_is_not_there_is_told_with_key_and_path(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(MissingInputError, match=f"{KEY}: .*nowhere is no folder") as caught:
        find_adapter(str(tmp_path / "nowhere"), KEY)
    assert caught.value.exit_code == 66
    with pytest.raises(MissingInputError, match=r"no adapter_config\.json: not an adapter"):
        find_adapter(str(tiny_pair[0]), KEY)
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[0])
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(RefusedError, match="pickled"):
        find_adapter(str(adapter), KEY)
    with pytest.raises(MissingInputError, match=r"name its base .* as models.teacher.adapter"):
        find_model(str(adapter), "models.teacher.path")


def test_teacher_and_student_with_adapters_train_as_their_merged_folders_do(
    tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    teacher, student, rows = tiny_pair
    adapters = [
        write_adapter(tmp_path / f"adapter-{base.name}", base) for base in (teacher, student)
    ]
    curriculum = {"num_stages": 1, "epochs_per_stage": 2}
    models = {
        "teacher": {"path": str(teacher), "adapter": str(adapters[0])},
        "student": {"path": str(student), "adapter": str(adapters[1])},
    }
    beside = write_config(tmp_path / "beside", *tiny_pair, models=models, curriculum=curriculum)
    config = load_config([beside])
    run = RunDirectory(Path(config.run_dir))
    check_inputs(config, run)  # merges, before the ranks start
    found_teacher = teacher_source(config, run)
    assert found_teacher is not None
    merged = write_config(
        tmp_path / "merged", found_teacher.folder, student_source(config, run).folder, rows,
        curriculum=curriculum,
    )  # fmt: skip
    plain = write_config(tmp_path / "plain", *tiny_pair, curriculum=curriculum)
    ran = train_all({"beside": beside, "merged": merged, "plain": plain}, 2)
    assert {name: error for name, (_, error) in ran.items() if error} == {}
    steps = {name: found for name, (found, _) in ran.items()}
    assert_same_steps(steps["beside"], steps["merged"], 0.0)  # type: ignore[arg-type]
    assert steps["beside"].losses != steps["plain"].losses  # type: ignore[union-attr]
    assert len(left_in(cache_folder())) == 2


def test_a_misfit_stops_a_run_before_anything_starts(
    tiny_pair: Pair, cache: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_pair[1])
    models = {
        "teacher": {"path": str(tiny_pair[0]), "adapter": str(adapter)},
        "student": {"path": str(tiny_pair[1])},
    }
    config = load_config([write_config(tmp_path / "run", *tiny_pair, models=models)])
    run = RunDirectory(Path(config.run_dir))
    with pytest.raises(MismatchError, match=r"models.teacher.adapter: .* does not fit"):
        check_inputs(config, run)
    assert left_in(cache) == [] and not results_in(run.root)


def test_an_adapter_for_a_student_that_is_cut_from_the_teacher_is_refused(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    models = {
        "teacher": {"path": str(tiny_pair[0])},
        "student": {"init_layers": [0], "adapter": "somewhere"},
    }
    with pytest.raises(ConfigError, match=r"models.student.adapter: needs models.student.path"):
        load_config([write_config(tmp_path, *tiny_pair, models=models)])
