"""`pocl-dist doctor` finds planted faults, tells the code the run would end with, and no secrets.

Through the real command line, on the bundled models and rows; each fault is planted in a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pocl_dist import guards
from pocl_dist.bundled import __file__ as bundled_file
from pocl_dist.cli import main
from pocl_dist.cluster.doctor.registry import CHECKS
from pocl_dist.cluster.doctor.table import table
from pocl_dist.pipeline.run_lock import run_lock
from tests.tiny import make_tokenizer, write_rows

ROOT = Path(__file__).parents[1]
BUNDLED = Path(bundled_file).parent


@dataclass(frozen=True)
class Outcome:
    """How doctor ended, and what it found."""

    code: int
    findings: list[dict[str, str]]

    def lines(self, severity: str) -> list[str]:
        """Returns `check: what` of the findings of a severity."""
        return [f"{f['check']}: {f['what']}" for f in self.findings if f["severity"] == severity]


Doctor = Callable[..., Outcome]


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Doctor:
    """Returns a function that examines tiny_cpu.yaml, few rows of it, with words on top."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        few = [f"run_dir={tmp_path / 'run'}", "data.limit=100", "data.eval_limit=20"]
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "tiny_cpu.yaml", *few, "data.dev=null", *map(str, words), "--json"])
        told = json.loads(capsys.readouterr().out)
        assert int(caught.value.code or 0) == told["exit_code"]
        return Outcome(told["exit_code"], told["findings"])

    return run


def write_config(folder: Path, **sections: object) -> Path:
    """Writes a config of some sections, to be layered over tiny_cpu.yaml."""
    path = folder / "more.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


# --- a healthy run


def test_a_healthy_config_is_0_and_nothing_is_left_behind(doctor: Doctor, tmp_path: Path) -> None:
    outcome = doctor()
    assert (outcome.code, outcome.lines("error"), outcome.lines("warning")) == (0, [], [])
    assert {f["check"] for f in outcome.findings if f["severity"] == "skipped"} == {
        "GPUs",
        "all-reduce",
        "other nodes",
    }
    assert list(tmp_path.iterdir()) == []


CODE = """
import sys, time
started = time.monotonic()
from pocl_dist.cli import main
try:
    main(["doctor", "tiny_cpu.yaml", *sys.argv[1:]])
except SystemExit as end:
    heavy = [name for name in ("torch", "deepspeed", "ray", "transformers", "datasets")
             if name in sys.modules]
    print(end.code, heavy, time.process_time())
"""


def test_it_takes_seconds_and_loads_no_torch(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CODE, f"run_dir={tmp_path}/run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    code, _, rest = done.stdout.splitlines()[-1].partition(" ")
    heavy, _, seconds = rest.rpartition(" ")
    assert (code, heavy) == ("0", "[]"), done.stderr
    assert float(seconds) < 5


def test_in_a_pipe_the_output_is_plain_and_its_last_line_says_how_a_run_would_end(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-m", "pocl_dist", "doctor", "tiny_cpu.yaml", "data.train=no.jsonl"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT.as_posix()},
    )
    assert done.returncode == 66
    assert "\033" not in done.stdout and done.stderr == ""
    assert "  error    rows               data.train: no.jsonl does not exist" in done.stdout
    assert "the run would end with exit code 66: a file" in done.stdout.splitlines()[-1]


# --- the config and the rows


def test_all_mistakes_of_a_config_are_told_at_once(doctor: Doctor) -> None:
    unknown = doctor("optimizer.lerning_rate=1", "engine.zero_stage=4", "seed=no")
    assert unknown.code == 64 and len(unknown.lines("error")) == 3
    contrary = doctor("engine.world_size=3", "teacher.source=cache_topk", "policy.mode=on")
    assert contrary.code == 64
    assert [line.split(":")[1].strip() for line in contrary.lines("error")] == [
        "policy.mode",
        "engine.global_batch_size",
    ]


GOOD = {"instruction": "say a", "output": "a"}
BAD_ROWS = {
    "empty answer": ('{"instruction": "a", "output": " "}', "field 'output' is empty"),
    "no answer": ('{"instruction": "a"}', "lacks field 'output'"),
    "not JSON": ("hello", "not JSON"),
}


@pytest.mark.parametrize("key", ["data.train", "data.dev", "data.eval.0"])
def test_bad_rows_of_every_source_are_65_and_all_are_counted(
    doctor: Doctor, tmp_path: Path, key: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 40)
    file.write_text(file.read_text() + "\n".join(bad for bad, _ in BAD_ROWS.values()) + "\n")
    value = f"[{file}]" if key.endswith(".0") else file
    outcome = doctor(f"{key.removesuffix('.0')}={value}", "data.eval_limit=null")
    (line,) = outcome.lines("error")
    assert outcome.code == 65
    assert line.startswith(f"rows: {key}: 3 of 43 rows are bad: {file}:41: field 'output' is empty")
    assert all(reason in line for _, reason in BAD_ROWS.values())


def test_with_quarantine_bad_rows_are_a_warning_until_there_are_too_many(
    doctor: Doctor, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 40)
    file.write_text(file.read_text() + "bad\nworse\n")
    words = [f"data.train={file}", "data.on_bad_row=quarantine"]
    assert doctor(*words).code == 0
    assert any("2 of 42 rows are bad" in line for line in doctor(*words).lines("warning"))
    assert doctor(*words, "data.max_bad_rows=1").code == 65


def test_repeats_test_questions_in_the_training_data_and_small_stages_are_warned_of(
    doctor: Doctor, tmp_path: Path
) -> None:
    rows = [{"instruction": f"say {index}", "output": "a"} for index in range(30)]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(map(json.dumps, [*rows, rows[3], rows[3]])))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"instruction": " Say  5", "output": "b"}) + "\n" + json.dumps(GOOD))
    outcome = doctor(f"data.train={train}", f"data.eval=[{test}]")
    warnings = "\n".join(outcome.lines("warning"))
    assert outcome.code == 0
    assert "2 of 32 rows repeat another (most often, 3 times: 'say 3')" in warnings
    assert "data.eval.0: 1 of 2 questions (50.0%) stand in data.train too" in warnings
    assert "the first of 4 stages has 8 rows, less than engine.global_batch_size 16" in warnings


def test_cut_rows_are_a_warning_that_names_bounds_with_which_they_fit(doctor: Doctor) -> None:
    outcome = doctor("data.max_tokens=24", "data.max_prompt_tokens=20")
    (line,) = [line for line in outcome.lines("warning") if "data.train: prompts" in line]
    assert outcome.code == 0 and "cut: " in line
    how = next(f["how"] for f in outcome.findings if f["what"] in line)
    fits = dict(
        part.split()[:2] for part in how.removeprefix("99 % of the rows fit with ").split(" and ")
    )
    words = [f"{key}={value}" for key, value in fits.items()]
    assert not [line for line in doctor(*words).lines("warning") if "data.train" in line]


# --- one fault, one code


def copied(folder: Path, role: str = "student") -> Path:
    """Returns a copy of a bundled model."""
    shutil.copytree(BUNDLED / role, folder / role)
    return folder / role


def edit(file: Path, **values: object) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def truncated(folder: Path) -> list[str]:
    weights = copied(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    return [f"models.student.path={folder}/student"]


def lost_shard(folder: Path) -> list[str]:
    index = copied(folder) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    return [f"models.student.path={folder}/student"]


def pickled(folder: Path) -> list[str]:
    weights = copied(folder) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    return [f"models.student.path={folder}/student"]


def own_code(folder: Path) -> list[str]:
    edit(copied(folder) / "config.json", auto_map={"AutoModel": "x.Y"})
    return [f"models.student.path={folder}/student"]


def unknown_architecture(folder: Path) -> list[str]:
    edit(copied(folder) / "config.json", model_type="llamma")
    return [f"models.student.path={folder}/student"]


def few_positions(folder: Path) -> list[str]:
    edit(copied(folder) / "config.json", max_position_embeddings=100)
    return [f"models.student.path={folder}/student"]


def other_tokenizer(folder: Path) -> list[str]:
    make_tokenizer().save_pretrained(copied(folder))
    return [f"models.student.path={folder}/student"]


def more_tokens_than_rows(folder: Path) -> list[str]:
    edit(copied(folder) / "config.json", vocab_size=1100)
    return [f"models.student.path={folder}/student"]


def no_eos(folder: Path) -> list[str]:
    for role in ("teacher", "student"):
        edit(copied(folder, role) / "tokenizer_config.json", eos_token=None)
    return [f"models.{role}.path={folder}/{role}" for role in ("teacher", "student")]


def no_tokenizer(folder: Path) -> list[str]:
    (copied(folder) / "tokenizer.json").unlink()
    return [f"models.student.path={folder}/student"]


def broken_gguf(folder: Path) -> list[str]:
    (folder / "teacher.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    return [f"models.teacher.path={folder}/teacher.gguf"]


def foreign_files(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")
    return []


def hostfile(text: str | None) -> Callable[[Path], list[str]]:
    def plant(folder: Path) -> list[str]:
        if text is not None:
            (folder / "hosts").write_text(text)
        return [f"launch.hostfile={folder}/hosts", "launch.ranks_with=deepspeed", "launch.nodes=2"]

    return plant


def words(*given: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(given)


FAULTS: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "no config": (words("no.yaml"), 66, "config file no.yaml does not exist"),
    "no rows": (words("data.train=no.jsonl"), 66, "data.train: no.jsonl does not exist"),
    "no test rows": (words("data.eval=[a.jsonl, b.jsonl]"), 66, "data.eval.1: b.jsonl does not"),
    "few rows": (words("data.limit=3"), 65, "3 rows cannot fill curriculum.num_stages 4 stages"),
    "no teacher": (words("models.teacher.path=/no/such"), 66, "models.teacher.path: /no/such does"),
    "cut download": (truncated, 66, "bytes of weights and "),
    "lost shard": (lost_shard, 66, "lacks 1 of 1 files of weights"),
    "pickle": (pickled, 77, "only pickled weights (pytorch_model.bin)"),
    "own code": (own_code, 77, "brings Python code of its own"),
    "architecture": (unknown_architecture, 66, "no causal language model of model_type 'llamma'"),
    "positions": (few_positions, 64, "data.max_tokens: 128 is more than the 100 positions"),
    "other tokenizer": (other_tokenizer, 78, "have different tokenizers"),
    "added tokens": (more_tokens_than_rows, 78, "has 1115 tokens, its head 1100 rows"),
    "no eos": (no_eos, 78, "has no eos token"),
    "no tokenizer": (no_tokenizer, 66, "no usable tokenizer"),
    "GGUF": (broken_gguf, 66, "is no usable GGUF file"),
    "layers": (
        words("models.student.path=", "models.student.init_layers=[0, 3]"),
        64,
        "init_layers: 3 is not allowed: the teacher has layers 0..2",
    ),
    "LoRA": (
        words("models.student.lora={target_modules: [c_attn]}"),
        64,
        "lora.target_modules: c_attn is the name of no layer",
    ),
    "chat template": (words("data.template=chat"), 64, "'chat' is not possible"),
    "no room": (words("data.max_prompt_tokens=3"), 64, "data.max_prompt_tokens: 3 leaves no room"),
    "top-k": (
        words("teacher.source=cache_topk", "teacher.top_k=5000"),
        64,
        "teacher.top_k: 5000 is more than the 1115 tokens",
    ),
    "batch": (
        words("engine.world_size=", "--nodes", "3", "--gpus-per-node", "1"),
        64,
        "16 rows cannot be shared by",
    ),
    "ranks": (words("--nodes", "2", "--gpus-per-node", "4"), 64, "engine.world_size: 2, but"),
    "nodes": (
        words("launch.nodes=2", "engine.world_size="),
        64,
        "launch.nodes: 2, but launch.ranks_with 'local' starts ranks on this machine only",
    ),
    "fp16": (words("engine.dtype=fp16"), 64, "'fp16' is not possible on CPU"),
    "foreign files": (foreign_files, 78, "is no run directory: it holds thesis.tex"),
    "not writable": (words("run_dir=/proc/sys/run"), 74, "/proc/sys"),
    "no hostfile": (hostfile(None), 66, "hosts does not exist"),
    "hostfile": (hostfile("node1\n"), 64, "'node1' is not `HOST slots=N`"),
    "host twice": (hostfile("a slots=1\na slots=1\n"), 64, "a is there twice"),
    "few hosts": (hostfile("a slots=1\n"), 64, "launch.nodes: 2, but"),
    "host": (
        hostfile("no-such-host.invalid slots=1\nb.invalid slots=1\n"),
        69,
        "host no-such-host.invalid",
    ),
    "Ray address": (words("ray.address=nowhere"), 64, "ray.address: 'nowhere' is not allowed"),
    "Ray": (
        words("ray.address=127.0.0.1:1", "ray.start_timeout_seconds=5"),
        69,
        "cannot reach Ray at 127.0.0.1:1",
    ),
    "server": (
        words(
            "measure={engine: server, server_url: 'http://127.0.0.1:1/v1', server_model: m, "
            "server_key_variable: NO_SUCH_VARIABLE}"
        ),
        64,
        "NO_SUCH_VARIABLE is not set",
    ),
}  # fmt: skip


PROMISED = {"config": (64, 66), **{check.name: check.exit_codes for check in CHECKS}}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_the_code_of_the_run(
    doctor: Doctor, tmp_path: Path, name: str
) -> None:
    plant, code, what = FAULTS[name]
    given = plant(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = doctor(*given)
    errors = [f for f in outcome.findings if f["severity"] == "error"]
    assert outcome.code == code, errors
    assert any(what in f["what"] for f in errors), errors
    assert all(f["why"] and f["how"] for f in errors), errors
    assert all(f["exit_code"] in PROMISED[f["check"]] for f in errors), errors
    assert sorted(tmp_path.rglob("*")) == before


def test_the_exit_code_is_that_of_the_first_error_not_of_the_worst(doctor: Doctor) -> None:
    outcome = doctor("data.limit=3", "models.teacher.path=/no/such", "data.template=chat")
    assert len(outcome.lines("error")) == 3
    assert outcome.code == 65


def test_a_locked_run_directory_is_73_and_stays_as_it_is(doctor: Doctor, tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        outcome = doctor()
        assert outcome.code == 73 and "is in use by process" in outcome.lines("error")[0]
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_earlier_results_are_compared_with_the_config(
    doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = ["curriculum.num_stages=1"]
    with pytest.raises(SystemExit):
        main(["plan", "tiny_cpu.yaml", f"run_dir={tmp_path / 'run'}", "data.limit=100", *planned])
    capsys.readouterr()
    assert doctor(*planned, "optimizer.learning_rate=1").code == 0  # nothing was trained yet
    outcome = doctor(*planned, "data.limit=99")
    assert outcome.code == 78
    assert "plan.json was made with data.limit 100, now 99" in outcome.lines("error")[0]


def test_a_port_that_is_taken_is_69(doctor: Doctor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = doctor(
            f"launch.master_port={port}", "launch.ranks_with=torchrun", "engine.world_size=1"
        )
    assert outcome.code == 69 and f"{port} is in use" in outcome.lines("error")[0]


def test_too_little_disk_is_74(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    small = shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    outcome = doctor()
    assert outcome.code == 74
    assert "the run writes about 16.3 MB" in outcome.lines("error")[0]


def test_a_hub_id_is_read_from_the_hubs_cache_and_is_69_when_neither_has_it(
    tmp_path: Path,
) -> None:
    commit, hub = "a" * 40, tmp_path / "hub"
    home = hub / "models--me--teacher"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(BUNDLED / "teacher", home / "snapshots" / commit)
    words = ["models.teacher.path=me/teacher", "models.student.path=me/student", "run_dir=run"]
    offline = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pocl_dist", "doctor", "tiny_cpu.yaml", *words, "data.limit=50"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **offline},
    )
    assert done.returncode == 69, done.stdout + done.stderr
    assert "teacher: LlamaForCausalLM, 3 layers" in done.stdout
    assert "'me/student' is no local folder or file, and the hub could not be" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


# --- the environment

ENVIRONMENTS = {
    "open Ray": ({"RAY_AUTH_MODE": "disabled"}, 77, "RAY_AUTH_MODE is 'disabled'"),
    "rank too high": ({"RANK": "0", "WORLD_SIZE": "0"}, 64, "RANK is 0, but WORLD_SIZE is 0"),
    "world size": (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        64,
        "engine.world_size is 2, but the launcher started 4",
    ),
    "no master": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        69,
        "MASTER_ADDR, MASTER_PORT not set for rank 0 of 2",
    ),
    "scratch in the run": ({"TMPDIR": "RUN/tmp"}, 64, "lies in RUN; scratch"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_fault_of_the_environment_is_found(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)  # what `main` calls for a rank
    variables, code, what = ENVIRONMENTS[name]
    run = str(tmp_path / "run")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.replace("RUN", run))
    outcome = doctor()
    assert outcome.code == code, outcome.lines("error")
    assert any(what.replace("RUN", run) in line for line in outcome.lines("error"))


def test_a_package_with_a_known_hole_is_77(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "version", lambda name: "2.9.1" if name == "torch" else "99.0")
    outcome = doctor()
    assert outcome.code == 77
    assert outcome.lines("error") == [
        "known holes: torch 2.9.1 has known security holes; install torch >= 2.10.0 (SECURITY.md)"
    ]


def test_nothing_secret_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SERVER_KEY")
    for name in names:
        monkeypatch.setenv(name, f"hunter2-{name}")
    token = tmp_path / "token"
    token.write_text("hunter2-in-a-file")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    server = (
        "measure={engine: server, server_url: 'http://127.0.0.1:1/v1', server_model: m, "
        "server_key_variable: SERVER_KEY, server_retries: 0}"
    )
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            main(
                [
                    "doctor",
                    "tiny_cpu.yaml",
                    f"run_dir={tmp_path}/run",
                    server,
                    "ray.address=127.0.0.1:1",
                    "ray.start_timeout_seconds=5",
                    *more,
                ]
            )
        said = "".join(capfd.readouterr())
        assert caught.value.code == 69
        assert "can be read by others (mode 644)" in said
        assert "hunter2" not in said


# --- the page


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert table() in page, "python -m pocl_dist.cluster.doctor.table prints it"
    assert len({check.name for check in CHECKS}) == len(CHECKS)
