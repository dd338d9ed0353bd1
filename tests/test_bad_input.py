"""Bad input through the real command line: exit code, a message that names the place, no traces.

The weights of the models here cannot be loaded: a check that comes too late gives another code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from pocl_dist.cli import main
from pocl_dist.errors import EXIT_CODES
from pocl_dist.pipeline.run_lock import run_lock
from tests.tiny import make_tokenizer, results_in, write_config, write_rows


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    message: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Returns a function that runs a command line in this process."""
    monkeypatch.setenv("POCL_DIST_PARENT", "")  # `main` sets it: it is to be put back

    def run(*words: object) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Outcome(int(caught.value.code or 0), captured.err + captured.out)

    return run


def write_model(folder: Path, extra_token: str = "") -> Path:
    """Writes a folder that looks like a model until its weights are opened."""
    tokenizer = make_tokenizer()
    if extra_token:
        tokenizer.add_tokens([extra_token])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    teacher, student = write_model(tmp_path / "teacher"), write_model(tmp_path / "student")
    return write_config(tmp_path, teacher, student, write_rows(tmp_path / "train.jsonl", 6))


def left_behind(config: Path) -> set[str]:
    """Returns what a refused command wrote."""
    return set(results_in(config.parent / "run")) - {"config.yaml", "status.json"}


# --- the config


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate: unknown key; did you mean 'l"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: 'fast' is not allowed"),
        ("engine.zero_stage=4", "engine.zero_stage: 4 is not allowed"),
        ("engine.world_size=3", "engine.global_batch_size: 8 rows cannot be shared by "),
        ("loss.name=foward_kl", "loss.name: unknown loss 'foward_kl'; did you mean 'forward_kl'?"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_64_and_nothing_is_written(
    command: Command, config: Path, word: str, reason: str
) -> None:
    outcome = command("run", config, word)
    assert outcome.code == 64
    assert reason in outcome.message
    assert not (config.parent / "run").exists()


def test_a_config_file_that_is_not_there_is_66(command: Command, tmp_path: Path) -> None:
    outcome = command("run", tmp_path / "no.yaml")
    assert outcome.code == 66 and str(tmp_path / "no.yaml") in outcome.message


# --- rows

BAD_ROWS = {
    "not JSON": (b"hello", "not JSON"),
    "not UTF-8": (b'{"instruction":"\xff","output":"b"}', "not UTF-8"),
    "lacks a field": (b'{"instruction":"a"}', "lacks field 'output'"),
    "empty response": (b'{"instruction":"a","output":""}', "field 'output' is empty"),
    "id twice": (
        b'{"id":"row-001","instruction":"a","output":"b"}',
        "id 'row-001' is that of row 2 too",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("key", ["data.train", "data.dev", "data.eval"])
def test_a_bad_row_is_65_with_file_and_row(
    command: Command, config: Path, key: str, name: str
) -> None:
    bad, reason = BAD_ROWS[name]
    file = write_rows(config.parent / "bad.jsonl", 3)
    file.write_bytes(file.read_bytes() + bad)
    outcome = command("run", config, f"{key}={[str(file)] if key == 'data.eval' else file}")
    assert outcome.code == 65
    assert f"{file}:4: {reason}" in outcome.message
    assert left_behind(config) == set()
    status = json.loads((config.parent / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["retryable"]) == ("failed", 65, False)
    assert reason in status["reason"]


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["data.train=EMPTY"], 65, "no row left"),
        (["curriculum.num_stages=7"], 65, "6 rows cannot fill curriculum.num_stages 7 stages"),
        (["data.train=nowhere.jsonl"], 66, "data.train: nowhere.jsonl does not exist (looked at /"),
        (["data.dev=nowhere.jsonl"], 66, "data.dev: nowhere.jsonl does not exist"),
        (["data.eval=[nowhere.jsonl]"], 66, "data.eval.0: nowhere.jsonl does not exist"),
        (["models.teacher.path=no/such/one"], 66, "models.teacher.path: no/such/one does not"),
        (["models.student.path=./nothing"], 66, "models.student.path: ./nothing does not exist"),
        pytest.param(
            ["engine.dtype=fp16"], 64, "engine.dtype: 'fp16' is not possible on CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["data.template=chat"], 64, "data.template: 'chat' is not possible"),
        (["data.max_prompt_tokens=3"], 64, "data.max_prompt_tokens: 3 leaves no room"),
        (["models.student.path=", "models.student.init_layers=[1, 2]"], 64,
         "models.student.init_layers: 2 is not allowed: the teacher has layers 0..1"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_any_model_loads(
    command: Command, config: Path, words: list[str], code: int, reason: str
) -> None:
    empty = config.parent / "empty.jsonl"
    empty.write_text("\n\n")
    outcome = command("run", config, *(word.replace("EMPTY", str(empty)) for word in words))
    assert (outcome.code, reason in outcome.message) == (code, True), outcome
    assert left_behind(config) == set()


# --- models


def test_a_student_with_another_tokenizer_is_78_and_the_token_is_named(
    command: Command, config: Path
) -> None:
    write_model(config.parent / "student", extra_token="zebra")
    outcome = command("run", config)
    assert outcome.code == 78
    assert "token 'zebra' is id None and" in outcome.message
    assert left_behind(config) == set()


def test_pickled_weights_and_a_models_own_code_are_77(command: Command, config: Path) -> None:
    student = config.parent / "student"
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoModel": "x.Y"}}))
    outcome = command("run", config)
    assert outcome.code == 77 and "trust_remote_code" in outcome.message
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    outcome = command("run", config)
    assert outcome.code == 77 and "only pickled weights (pytorch_model.bin)" in outcome.message
    assert left_behind(config) == set()


# --- the run directory


def test_a_locked_run_directory_is_73_and_is_left_as_it_is(command: Command, config: Path) -> None:
    run_dir = config.parent / "run"
    with run_lock(run_dir):
        before = (run_dir / "lock").read_text()
        outcome = command("plan", config)
        assert outcome.code == 73 and "is in use by process" in outcome.message
        assert [path.name for path in run_dir.iterdir()] == ["lock"]
        assert (run_dir / "lock").read_text() == before
    assert command("plan", config).code == 0


def test_another_config_on_a_planned_run_is_78_names_the_key_and_changes_nothing(
    command: Command, config: Path
) -> None:
    assert command("plan", config).code == 0
    run_dir = config.parent / "run"
    before = {**results_in(run_dir), "status.json": b""}
    outcome = command("plan", config, "curriculum.epochs_per_stage=3", "data.limit=5")
    assert outcome.code == 78
    assert "curriculum.epochs_per_stage: it was made with 2.0, now 3.0" in outcome.message
    assert "data.limit: it was made with None, now 5" in outcome.message
    assert {**results_in(run_dir), "status.json": b""} == before
    assert command("verify", run_dir).code == 0
    assert command("plan", config).code == 0


def test_bad_rows_on_a_finished_run_do_not_break_its_seal(command: Command, config: Path) -> None:
    assert command("plan", config).code == 0
    (config.parent / "train.jsonl").write_text("broken")
    assert command("plan", config, "seed=7").code == 65
    assert command("verify", config.parent / "run").code == 0
    kept = yaml.safe_load((config.parent / "run" / "config.yaml").read_text())
    assert kept["seed"] == 42


def test_what_a_killed_run_left_half_written_is_gone_also_when_the_next_command_is_refused(
    command: Command, config: Path
) -> None:
    leftover = config.parent / "run" / "checkpoints" / ".tmp-step-00000007" / "weights"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert command("plan", config, "data.train=nowhere.jsonl").code == 66
    assert not leftover.parent.exists()


def test_the_outcome_of_a_run_can_be_asked_for_later(command: Command, config: Path) -> None:
    run_dir = config.parent / "run"
    assert command("outcome", run_dir).code == 66
    command("plan", config)
    assert command("outcome", run_dir).code == 0
    command("plan", config, "data.train=nowhere.jsonl")
    outcome = command("outcome", run_dir)
    assert outcome.code == 66 and "nowhere.jsonl" in outcome.message


# --- usage, verify


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["plan"],
        ["plan", "--fast", "x.yaml"],
        ["plan", "--quie", "x"],
        ["verify"],
        ["score"],
    ],
)
def test_a_wrong_command_line_is_2(command: Command, words: list[str]) -> None:
    outcome = command(*words)
    assert outcome.code == 2 and "usage: pocl-dist" in outcome.message


def test_the_table_of_exit_codes_is_printed_in_order(command: Command) -> None:
    lines = command("exit-codes").message.splitlines()
    assert [int(line.split()[0]) for line in lines] == [row.code for row in EXIT_CODES]
    assert [line.split()[1] for line in lines] == [row.name for row in EXIT_CODES]


DAMAGES = {
    "flipped bit": "plan.json: content changed",
    "missing file": "plan.json: missing",
    "unlisted file": "smuggled.json: not listed",
    "tampered manifest": "manifest.json: does not match",
    "no seal": "manifest.json.sha256: missing",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_finds_what_was_changed_after_the_run(
    command: Command, config: Path, name: str
) -> None:
    command("plan", config)
    run_dir = config.parent / "run"
    assert command("verify", run_dir).code == 0
    plan, manifest = run_dir / "plan.json", run_dir / "manifest.json"
    if name == "flipped bit":
        content = bytearray(plan.read_bytes())
        content[40] ^= 1
        plan.write_bytes(bytes(content))
    elif name == "missing file":
        plan.unlink()
    elif name == "unlisted file":
        (run_dir / "smuggled.json").write_text("{}")
    elif name == "tampered manifest":
        manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes":  '))
    else:
        (run_dir / "manifest.json.sha256").unlink()
    outcome = command("verify", run_dir)
    assert outcome.code == 78 and DAMAGES[name] in outcome.message


def test_verify_of_nothing_is_66(command: Command, tmp_path: Path) -> None:
    outcome = command("verify", tmp_path / "nothing")
    assert outcome.code == 66 and "is no run directory" in outcome.message


def test_a_bad_row_and_a_broken_seal_are_known_within_seconds_from_a_shell(
    command: Command, config: Path
) -> None:
    command("plan", config)
    (config.parent / "run" / "plan.json").write_text("{}")
    (config.parent / "train.jsonl").write_text("broken")
    for words, code in ((["verify", config.parent / "run"], 78), (["run", config], 65)):
        started = time.monotonic()
        line = [sys.executable, "-m", "pocl_dist", *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert time.monotonic() - started < 4  # torch alone takes longer to import
