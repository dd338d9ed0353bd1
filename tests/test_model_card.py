"""The model card of an export: what it says, what it keeps for itself, and that its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pocl_dist.config import Config, load_config
from pocl_dist.config.loss_names import LOSSES
from pocl_dist.files import atomic_write_json, read_json, read_json_lines
from pocl_dist.pipeline.card_method import FORMULAS
from pocl_dist.pipeline.card_names import front_matter, is_hub_id, public_name
from pocl_dist.pipeline.manifest import write_manifest
from pocl_dist.pipeline.model_card import update_card
from pocl_dist.pipeline.plan import read_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.verify import find_changes
from tests.tiny import write_config
from tests.training import distill


@pytest.fixture(scope="module")
def run(
    tiny_pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """Returns a finished training with a dev metric."""
    folder = tmp_path_factory.mktemp("card")
    config = write_config(
        folder, *tiny_pair,
        data={"dev": str(tiny_pair[2]), "dev_limit": 4},
        loss={"name": "skew_reverse_kl"},
    )  # fmt: skip
    return distill(config, 1)


def card_of(run: RunDirectory) -> str:
    return (run.export / "README.md").read_text()


def config_of(run: RunDirectory) -> Config:
    return load_config([run.root.parent / "config.yaml"])


def test_every_loss_has_its_formula_with_its_own_arguments() -> None:
    assert FORMULAS.keys() == LOSSES.keys()
    for name, spec in LOSSES.items():
        assert set(re.findall(r"\{(\w+)", FORMULAS[name])) == set(spec.kwargs)


def test_the_card_tells_the_curriculum_as_it_was_planned_and_trained(run: RunDirectory) -> None:
    card = card_of(run)
    rows = read_json_lines(run.metrics)
    table = re.findall(
        r"^\| (\d) \| (\d+) \| (\S+) \| (\S+) \| (\d+) \| (\d+) \| (\S+) \|$", card, re.M
    )
    assert len(table) == 2
    for cells, stage in zip(table, read_plan(run.plan).stages, strict=True):
        dev = [row["value"] for row in rows if row["kind"] == "dev" and row["stage"] == stage.index]
        assert cells == (
            str(stage.index + 1),
            str(stage.num_examples),
            f"{stage.temperature:.3g}",
            f"{stage.kd_ratio:.3g}",
            str(stage.num_steps),
            f"{stage.num_examples * stage.epochs:.0f}",
            f"{dev[-1]:.2f}",
        )
    inputs = read_json(run.checkpoints / "inputs.json")
    for key in ("data", "student", "teacher", "plan", "tokenizer"):
        assert f"`{inputs[f'digest.{key}']}`" in card
    assert "D_T = KL(s ‖ (1 − α) t + α s), α = 0.1 per token" in card
    assert "`optimizer.learning_rate: 0.001`" in card
    assert "method: distillation (skew_reverse_kl) in 2 stages, ordering shuffled" in card
    assert "Not evaluated on a test set." in card


def test_the_card_names_no_folder_of_this_machine(run: RunDirectory) -> None:
    card = card_of(run)
    assert "teacher: `teacher`" in card and "training rows: `train.jsonl`" in card
    for secret in (str(Path.home()), str(run.root), "/tmp", str(run.root.parent.name)):
        assert secret not in card


def test_the_hub_reads_the_front_matter_as_it_was_meant(run: RunDirectory) -> None:
    data = ModelCard(card_of(run)).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "pocl"],
    }


def test_licence_base_model_and_data_set_are_named_where_they_are_known(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    config = Config.model_validate(
        {
            "run_dir": "run",
            "models": {"teacher": {"path": "acme/big"}, "student": {"path": "acme/small"}},
            "data": {"train": "acme/rows@main#train"},
        }
    )
    data = yaml.safe_load(front_matter(config, tmp_path).strip("-\n"))
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "acme/small" and data["datasets"] == ["acme/rows"]


def test_only_what_lies_nowhere_here_counts_as_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert not is_hub_id("models/small") and public_name("models/small") == "small"
    assert is_hub_id("acme/small") and public_name("acme/small") == "acme/small"
    assert public_name("/home/me/secret-project/gpt2") == "gpt2"
    assert public_name("./rows.jsonl") == "rows.jsonl" and not is_hub_id("data/rows.jsonl")
    assert public_name("package:llm/FILE.gguf") == "package:llm/FILE.gguf"


def test_the_code_of_the_card_loads_the_model_and_answers(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card_of(run), re.S)
    monkeypatch.chdir(run.export)
    values: dict[str, object] = {}
    exec(code, values)
    assert values["text"] == "### Instruction:\nWhat is a red panda?\n\n### Response:\n"
    assert capsys.readouterr().out == f"{values['answer']}\n"


def test_scores_come_into_the_card_once_there_are_some_and_the_run_still_verifies(
    run: RunDirectory,
) -> None:
    before = card_of(run)
    report = {"set": "test", "num_examples": 7, "rouge_l": 12.345, "exact_match": 50.0}
    atomic_write_json(run.eval / "test" / "report.json", report)
    figures = {"results": {"words": {"alias": "words", "acc,none": 0.25, "acc_stderr,none": 0.1}}}
    atomic_write_json(run.eval / "harness" / "task-words.json", figures)
    update_card(run)
    card = card_of(run)
    assert "| test | 7 | 12.35 | 50.00 |" in card or "| test | 7 | 12.34 | 50.00 |" in card
    assert "| words | acc | 0.2500 |" in card
    assert card.partition("## Scores")[0] == before.partition("## Scores")[0]
    assert card.partition("## Training")[2] == before.partition("## Training")[2]
    update_card(run)
    assert card_of(run) == card
    write_manifest(run.root)
    assert not [line for line in find_changes(run.root) if line.startswith("export/")]


def test_a_card_of_another_hand_is_left_as_it_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.export.mkdir()
    (run.export / "README.md").write_text("# Mine\n\n## Scores\n\nnone\n")
    update_card(run)
    assert card_of(run) == "# Mine\n\n## Scores\n\nnone\n"
