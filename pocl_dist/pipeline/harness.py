"""evaluate.harness: the export in EleutherAI's lm-evaluation-harness, in a process of its own.

    eval/harness/task-<name>.json   what it is made from, and the harness's figures

A finished task is not done again; a stop (75) loses the one that is under way.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, select_keys
from pocl_dist.config.keys import compare_inputs
from pocl_dist.display import output
from pocl_dist.display.output import say
from pocl_dist.errors import ConfigError, StoppedError, error_of
from pocl_dist.files import JSONValue, atomic_write_json, digest_of, read_json, sha256_file
from pocl_dist.models.sources import ModelFolder, model_digest
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest

POLL_SECONDS = 0.3
_INPUT_KEYS = ("generation.batch_size", "data.eval_limit", "data.template", "engine.dtype")


def task_file(run: RunDirectory, task: str) -> Path:
    """Returns where the figures of a task lie; of a file or folder its name counts."""
    name = Path(task).stem if Path(task).exists() else task
    return run.eval / "harness" / f"task-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json"


def config_inputs(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that the figures depend on."""
    return select_keys(config, _INPUT_KEYS)


def _inputs(config: Config, run: RunDirectory, task: str) -> dict[str, JSONValue]:
    path = Path(task)
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path] if path.exists() else []
    return {
        **config_inputs(config),
        "model": model_digest(ModelFolder(run.export, "export")),
        "task": Path(task).name,
        "task sha256": digest_of([sha256_file(file) for file in files]) if files else None,
    }


def check_harness(config: Config) -> None:
    """Raises ConfigError (64) for tasks that cannot be run: seconds, before a model is loaded."""
    tasks = config.evaluate.harness
    if not tasks:
        return
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.harness: needs the package lm_eval: pip install 'pocl_dist[harness]'"
        )
    for task in tasks:
        if not Path(task).exists() and (os.sep in task or task.endswith((".yaml", ".yml"))):
            raise ConfigError(f"evaluate.harness: {task}: no such file or folder")
        if Path(task).is_dir() and not list(Path(task).glob("*.yaml")):
            raise ConfigError(f"evaluate.harness: {task}: holds no .yaml file")
    names = [task_file(RunDirectory(Path()), task).name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"evaluate.harness: two tasks are called {', '.join(sorted(twice))}")
    if any(not Path(task).exists() for task in tasks):
        for _ in _worked_off({"tasks": list(tasks), "model": None}, lambda: False):
            pass


def run_harness(config: Config, run: RunDirectory) -> None:
    """Writes the figures of the tasks that are missing, and prints all as a table.

    Raises MismatchError (78) for figures that were made from other inputs, StoppedError (75) within
    a second of a request. What `check_harness` looks at is checked before.
    """
    tasks = config.evaluate.harness
    inputs = {task: _inputs(config, run, task) for task in tasks}
    missing = [task for task in tasks if not _is_done(task_file(run, task), inputs[task])]
    if missing:
        job: dict[str, JSONValue] = {
            "tasks": list(missing),
            "model": str(run.export.resolve()),
            "batch_size": config.generation.batch_size,
            "limit": config.data.eval_limit,
            "dtype": config.engine.dtype,
            "is_chat": config.data.template == "chat",
        }
        say(f"evaluate: {len(missing)} of {len(tasks)} tasks of the harness, with {run.export}")
        with StopRequest(run, config.run.max_wallclock_minutes).installed() as stop:
            for index, found in _worked_off(job, stop.is_asked):
                task = missing[index]
                made = {**inputs[task], "lm_eval": version("lm_eval")}
                atomic_write_json(task_file(run, task), made | found)
                say(f"evaluate: {task} is done, {index + 1} of {len(missing)}")
    say(_table([read_json(task_file(run, task)) for task in tasks]))


def _is_done(path: Path, inputs: Mapping[str, JSONValue]) -> bool:
    if not path.exists():
        return False
    found = read_json(path)
    compare_inputs({key: found.get(key) for key in inputs}, inputs, path)
    return True


def _worked_off(
    job: dict[str, JSONValue], is_stop_asked: Callable[[], bool]
) -> Iterator[tuple[int, dict[str, JSONValue]]]:
    """Yields (index, figures) of each task as a child process finishes them, in order.

    Raises what the child raised; StoppedError (75) when a stop is asked for.
    """
    with tempfile.TemporaryDirectory(prefix="pocl_dist-harness-") as folder:
        path = Path(folder) / "job.json"
        atomic_write_json(path, {**job, "folder": folder})
        environment = {**os.environ, "TQDM_DISABLE": "" if output.is_live() else "1"}
        # Its stdout holds nothing of ours. A session of its own: Ctrl-C is for us to act on.
        process = subprocess.Popen(
            [sys.executable, "-m", "pocl_dist.pipeline.harness_worker", str(path)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        index = 0
        try:
            while True:
                has_ended = process.poll() is not None
                while (file := Path(folder) / f"{index}.json").exists():
                    yield index, read_json(file)
                    index += 1
                if has_ended:
                    break
                if is_stop_asked():
                    raise StoppedError(
                        "stopped on request; finished tasks of the harness are saved, the same "
                        "command goes on"
                    )
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        _raise_error(Path(folder) / "error.json", process.returncode)


def _raise_error(file: Path, code: int) -> None:
    if file.exists():
        value = read_json(file)
        if error := error_of(int(cast("int", value["code"])), str(value["reason"])):
            raise error
    if code != 0:
        raise RuntimeError(f"the lm-evaluation-harness ended with code {code}; its words are above")


def figures_of(found: Mapping[str, JSONValue]) -> list[tuple[str, str, float, float | None]]:
    """Returns (task, metric, value, standard error) of what the harness says of a task."""
    rows = []
    for task, values in cast("dict[str, dict[str, JSONValue]]", found["results"]).items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kind}")
                spread = float(error) if isinstance(error, int | float) else None
                metric = name if kind == "none" else f"{name} ({kind})"
                rows.append((task, metric, float(value), spread))
    return rows


def _table(results: Sequence[Mapping[str, JSONValue]]) -> str:
    lines = ["| task | metric | value | standard error |", "|---|---|---|---|"]
    for found in results:
        for task, metric, value, error in figures_of(found):
            spread = "" if error is None else f"{error:.4f}"
            lines.append(f"| {task} | {metric} | {value:.4f} | {spread} |")
    return "\n".join(lines)


def read_results(run: RunDirectory) -> dict[str, JSONValue]:
    """Returns {task: the harness's figures} of all that is there."""
    files = sorted((run.eval / "harness").glob("task-*.json"))
    return {file.stem.removeprefix("task-"): read_json(file)["results"] for file in files}
