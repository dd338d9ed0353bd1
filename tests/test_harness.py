"""evaluate.harness: EleutherAI's lm-evaluation-harness on an export, with a local task."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pocl_dist.config import Config, load_config
from pocl_dist.config.steps import steps_of
from pocl_dist.errors import ConfigError, MismatchError, StoppedError
from pocl_dist.files import read_json
from pocl_dist.pipeline import harness
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.report import results
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.tiny import write_config

is_installed = harness.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not is_installed, reason="lm_eval IS NOT TESTED: pip install 'pocl_dist[harness]'"
)
QUESTIONS = [
    {"question": "say the cat", "choices": ["cat the", " a big old dog"], "answer": 0},
    {"question": "say one dog", "choices": [" trees far away", " dog one"], "answer": 1},
    {"question": "say red mat", "choices": [" mat red", " from under it"], "answer": 0},
]


def write_task(folder: Path, name: str) -> Path:
    """Writes a multiple-choice task over a local JSONL file."""
    folder.mkdir(exist_ok=True)
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def exported(
    folder: Path, pair: tuple[Path, Path, Path], tasks: list[str], **sections: object
) -> tuple[Config, RunDirectory]:
    """Returns a run whose export is the tiny student."""
    config = load_config([write_config(folder, *pair, evaluate={"harness": tasks}, **sections)])
    run = RunDirectory(Path(config.run_dir))
    shutil.copytree(pair[1], run.export)
    return config, run


def accuracy(folder: Path) -> float:
    """The oracle: the share of questions whose right answer is the likeliest, written plainly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            whole = tokenizer(f"{row['question']}{choice}")["input_ids"]
            start = len(tokenizer(row["question"])["input_ids"])
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logprobs[t - 1, whole[t]]) for t in range(start, len(whole))))
        num_right += scores.index(max(scores)) == row["answer"]
    return num_right / len(QUESTIONS)


@needs_harness
def test_a_task_of_a_local_file_is_scored_as_by_hand_kept_and_reported(
    tiny_pair: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    task = write_task(tmp_path / "tasks", "words")
    config, run = exported(tmp_path / "work", tiny_pair, [str(task)])
    assert "evaluate" in steps_of(config)
    evaluate(config, run)
    found = read_json(run.eval / "harness" / "task-words.json")
    ((name, metric, value, error),) = harness.figures_of(found)
    assert (name, metric, value) == ("words", "acc", accuracy(run.export))
    assert error is not None and math.isfinite(error)
    assert found["n-samples"] == {"words": {"original": 3, "effective": 3}}
    assert f"| words | acc | {value:.4f} | {error:.4f} |" in capsys.readouterr().out
    run.metrics.write_text("")
    assert results(run)["harness"] == {"words": found["results"]}

    written = (run.eval / "harness" / "task-words.json").stat().st_mtime_ns
    evaluate(config, run)  # is done already
    assert (run.eval / "harness" / "task-words.json").stat().st_mtime_ns == written
    task.write_text(task.read_text() + "# another\n")
    with pytest.raises(MismatchError, match="task sha256"):
        evaluate(config, run)


@needs_harness
def test_a_stop_ends_the_process_of_the_harness_within_a_second(tmp_path: Path) -> None:
    job = {"tasks": ["arc_easy"], "model": "nowhere"}
    asked = iter([False, True])
    with pytest.raises(StoppedError, match="the same command goes on"):
        list(harness._worked_off(job, lambda: next(asked)))  # type: ignore[arg-type]


@needs_harness
def test_the_process_of_the_harness_does_not_outlive_the_one_that_started_it(
    tmp_path: Path,
) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"tasks": ["arc_easy"], "model": "nowhere"}))
    words = [sys.executable, "-m", "pocl_dist.pipeline.harness_worker", str(job)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()  # as the system does for a parent that is killed
    assert process.wait(60) == 71


@needs_harness
@pytest.mark.slow
def test_a_name_that_the_harness_does_not_know_is_refused_before_a_model_is_loaded(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config, _ = exported(tmp_path, tiny_pair, ["no_such_task_of_the_harness"])
    with pytest.raises(ConfigError, match=r"no_such_task_of_the_harness: no such task"):
        harness.check_harness(config)


def test_what_cannot_be_run_is_refused_at_once(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    config, _ = exported(tmp_path / "a", tiny_pair, ["arc_easy"])
    with pytest.raises(ConfigError, match=r"pip install 'pocl_dist\[harness\]'"):
        harness.check_harness(config)
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    task = str(write_task(tmp_path / "tasks", "words"))
    (tmp_path / "empty").mkdir()
    for tasks, reason in (
        (["tasks/none.yaml"], r"tasks/none\.yaml: no such file or folder"),
        ([str(tmp_path / "empty")], "holds no .yaml file"),
        ([task, task], "two tasks are called task-words.json"),
    ):
        config = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"harness": tasks})}
        )
        with pytest.raises(ConfigError, match=reason):
            harness.check_harness(config)
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"harness": []})}
    )
    harness.check_harness(config)
    assert "evaluate" not in steps_of(config)


def test_the_command_line_s_tasks_are_those_of_the_config(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pocl_dist.cli import main

    config, run = exported(tmp_path, tiny_pair, [])
    words = ["evaluate", str(tmp_path / "config.yaml"), "--harness", "no/a.yaml,no/b.yaml"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 64
    assert "evaluate.harness:" in capsys.readouterr().err
    assert load_config([run.root / "config.yaml"]).evaluate.harness == ["no/a.yaml", "no/b.yaml"]
    del config
