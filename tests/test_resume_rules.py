"""What another value does when a run goes on: every key is classified, once, as the code has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from pocl_dist.cli import main
from pocl_dist.config import load_config, select_keys
from pocl_dist.errors import MismatchError
from pocl_dist.files import atomic_write_json
from pocl_dist.pipeline import generated_files
from pocl_dist.pipeline.difficulty_files import model_inputs
from pocl_dist.pipeline.generate import generate
from pocl_dist.pipeline.inputs import read_prompts, student_source, teacher_source
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.resume_rules import (
    FREE,
    Rule,
    full_config,
    records_of,
    rules,
    schema_keys,
    table,
)
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Plan
from tests.test_verify import _other_score, planned_run
from tests.tiny import write_config, write_rows

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "resume.md"


def test_every_key_of_the_schema_is_classified_exactly_once() -> None:
    found = rules()
    assert [rule.key for rule in found] == list(schema_keys())
    unclassified = [rule.key for rule in found if not rule.refused_by and not rule.reason]
    assert not unclassified, "say in resume_rules.FREE why it is free, or record it"
    assert not [rule.key for rule in found if rule.refused_by and rule.reason]
    assert set(FREE) <= set(schema_keys())


def _with(section: BaseModel, key: str, value: object) -> BaseModel:
    name, _, rest = key.partition(".")
    return section.model_copy(
        update={name: _with(getattr(section, name), rest, value) if rest else value}
    )


def _other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, BaseModel):  # a section whose keys are all free
        others = {name: _other(getattr(value, name)) for name in type(value).model_fields}
        return value.model_copy(update=others)
    if isinstance(value, int | float):
        return value + 1
    return [*value, 7] if isinstance(value, list) else f"not {value}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.key)
def test_another_value_changes_just_the_records_that_the_table_names(rule: Rule) -> None:
    config, made = full_config(), Plan((), ())
    value: object = config
    for part in rule.key.split("."):
        value = getattr(value, part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other value need not be one that is allowed
        changed = _with(config, rule.key, _other(value))
        assert select_keys(changed, [rule.key]) != select_keys(config, [rule.key])
        before, after = records_of(config, made), records_of(changed, made)  # type: ignore[arg-type]
    assert tuple(name for name in before if before[name] != after[name]) == rule.refused_by


def test_the_document_has_the_table_as_it_is() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), (
        "put the output of `python -m pocl_dist.pipeline.resume_rules` into docs/resume.md"
    )


# --- what no key tells: rows, tokenizer, weights, scores, plan


def _run_again(root: Path) -> None:
    config = load_config([root / "config.yaml"])
    make_plan(config, RunDirectory(root))


def _other_rows(root: Path) -> None:
    rows = root.parent / "train.jsonl"
    rows.write_text(rows.read_text().replace("say ", "shout "))


def _other_plan(root: Path) -> None:
    path = root / "plan.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 1.5'))


def _other_template(root: Path) -> None:
    path = root / "config.yaml"
    path.write_text(path.read_text().replace("template: short", "template: alpaca"))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows": (_other_rows, "data.train sha256: it was made with"),
    "template": (_other_template, "data.template: it was made with 'short', now 'alpaca'"),
    "difficulty shard": (_other_score, "difficulty sha256: it was made with"),
    "plan": (_other_plan, "was changed after it was made"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_the_plan_is_refused_by_name(tmp_path: Path, name: str) -> None:
    root = planned_run(tmp_path)
    _run_again(root)
    change, reason = CHANGES[name]
    change(root)
    with pytest.raises(MismatchError, match=reason):
        _run_again(root)


def _write_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        atomic_write_json(folder / name, {})
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("file", "key"),
    [("tokenizer.json", "model tokenizer sha256"), ("model.safetensors", "model sha256")],
)
def test_another_tokenizer_or_other_weights_are_refused_before_a_model_is_loaded(
    tmp_path: Path, file: str, key: str
) -> None:
    teacher, student = _write_model(tmp_path / "teacher"), _write_model(tmp_path / "student")
    rows = write_rows(tmp_path / "train.jsonl", 6)
    config = load_config([write_config(tmp_path, teacher, student, rows)])
    run, found = RunDirectory(Path(config.run_dir)), read_prompts(config)
    of_teacher, of_student = teacher_source(config, run), student_source(config, run)
    assert of_teacher is not None
    shared = {"data.train sha256": found.digest}
    inputs = generated_files.config_inputs(config) | shared
    atomic_write_json(
        run.generated / "inputs.json", inputs | model_inputs("models.teacher model", of_teacher)
    )
    from pocl_dist.pipeline.difficulty_files import config_inputs

    inputs = config_inputs(config, found) | model_inputs("models.student model", of_student)
    atomic_write_json(run.difficulty / "inputs.json", inputs)
    for folder, step, role in ((teacher, generate, "teacher"), (student, measure, "student")):
        (folder / file).write_bytes(b"{} ")
        with pytest.raises(MismatchError, match=f"models.{role} {key}: it was made with"):
            step(config, run)


def test_a_free_key_goes_on_and_a_frozen_one_names_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POCL_DIST_PARENT", "")
    root = planned_run(tmp_path)
    codes = []
    for word in ("log.every=3", "checkpoint.keep_last=5", "curriculum.num_stages=3"):
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(root / "config.yaml"), word])
        codes.append(caught.value.code)
    assert codes == [0, 0, 78]
    assert "curriculum.num_stages: it was made with 2, now 3" in capfd.readouterr().err
