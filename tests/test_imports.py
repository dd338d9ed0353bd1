"""What needs no model loads no torch, ray or deepspeed: 0.3 s instead of 5 s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_dist.config import load_config
from pocl_dist.files import atomic_write_text
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_step import run_step

HEAVY = ("torch", "deepspeed", "ray", "transformers", "datasets")
# Runs a command line in a fresh interpreter; tells its exit code and what it loaded.
CODE = f"""
import json, sys
from pocl_dist.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def run(*words: str, code: str = CODE) -> list[object]:
    """Returns [exit code, heavy packages] of a command."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    result: list[object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a sealed run directory, predictions and references."""
    root = tmp_path_factory.mktemp("light")
    run = RunDirectory(root / "run")
    config = load_config(["tiny_cpu.yaml"], [f"run_dir={run.root}", "curriculum.num_stages=1"])
    run.write_config(config)
    run_step("plan", make_plan, config, run)
    run.write_status("done", 0, "plan")
    atomic_write_text(root / "predictions.jsonl", '{"text": "b"}\n')
    atomic_write_text(root / "references.jsonl", '{"prompt": "a", "response": "b"}\n')
    return root


COMMANDS = {
    "help": "--help",
    "version": "--version",
    "exit-codes": "exit-codes",
    "verify": "verify run",
    "score": "score --predictions predictions.jsonl --references references.jsonl",
    "plan": "plan tiny_cpu.yaml run_dir=planned curriculum.num_stages=1",
    "report": "report tiny_cpu.yaml run_dir=run curriculum.num_stages=1",
    "plan, shuffled": "plan tiny_cpu.yaml run_dir=shuffled curriculum.ordering=shuffled",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_a_model_loads_none_of_the_heavy_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    assert run(*COMMANDS[name].split()) == [0, []]


def test_config_records_and_the_module_of_every_step_load_none_of_the_heavy_packages() -> None:
    steps = ["run", "plan", "measure", "compare"]
    modules = ["config", "records", "run_log", *(f"pipeline.{step}" for step in steps)]
    imports = "".join(f"import pocl_dist.{module}\n" for module in modules)
    loaded = f"print(json.dumps([0, [name for name in {HEAVY!r} if name in sys.modules]]))"
    assert run(code=f"import json, sys\n{imports}{loaded}") == [0, []]
