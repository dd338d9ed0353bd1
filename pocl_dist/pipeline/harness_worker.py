"""The process in which the lm-evaluation-harness runs; started by harness.py with a JOB.json.

It has the model's memory to itself, and can be ended at any moment. Each finished task is a file in
the job's folder; an error of ours is `error.json`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pocl_dist.errors import (
    ConfigError,
    MissingInputError,
    PoclError,
    UnavailableError,
    WorkerError,
)
from pocl_dist.files import JSONValue, atomic_write_json, read_json

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of the harness's account of a task; not its samples, and not this machine."""


def task_manager(tasks: Sequence[str]) -> TaskManager:
    """Returns a manager that knows the tasks; ConfigError (64) names those that it does not."""
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if not Path(task).exists()]
    # The harness's own tasks are thousands of files: not read when none is asked for.
    manager = TaskManager(include_defaults=bool(names))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"evaluate.harness: {', '.join(unknown)}: no such task, and no such file; "
            "`lm-eval ls tasks` lists them"
        )
    return manager


def _loaded_model(job: dict[str, JSONValue]) -> LM:
    import torch
    from lm_eval.models.huggingface import HFLM

    from pocl_dist.distributed.process_group import torch_dtype

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return HFLM(
        pretrained=str(job["model"]),
        backend="causal",
        dtype=torch_dtype(cast("str | None", job["dtype"]), device),
        device=str(device),
        batch_size=int(cast("int", job["batch_size"])),
        trust_remote_code=False,
    )


def _plain(value: object) -> JSONValue:
    """Returns a value as JSON; what is not finite is null, what JSON lacks is text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    number = float(value) if hasattr(value, "__float__") else None
    if number is None:
        return str(value)
    return number if math.isfinite(number) else None


def _files(task: str) -> list[str]:
    """Returns what the harness is asked for: the files of a folder, else the word as it is."""
    path = Path(task)
    if path.is_dir():
        return [str(file) for file in sorted(path.glob("*.yaml"))]
    return [str(path.resolve())] if path.exists() else [task]


def work(job: dict[str, JSONValue]) -> None:
    """Does what the job says: checks the names, and then, unless that is all, runs the tasks."""
    import lm_eval

    tasks = [str(task) for task in cast("list[JSONValue]", job["tasks"])]
    manager = task_manager(tasks)
    if job["model"] is None:
        return
    model = _loaded_model(job)
    for index, task in enumerate(tasks):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=_files(task),
            task_manager=manager,
            limit=cast("int | None", job["limit"]),
            apply_chat_template=bool(job["is_chat"]),
            log_samples=False,
        )
        kept = {key: _plain(found[key]) for key in KEPT if found.get(key)}
        atomic_write_json(Path(str(job["folder"])) / f"{index}.json", kept)


def _end_with_parent() -> None:
    sys.stdin.read()  # nothing comes; it ends when the parent does, however that ended
    os._exit(WorkerError.exit_code)


def main(path: Path) -> None:
    """Works off the job in `path`; errors that are no bug are written beside it."""
    job = read_json(path)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        try:
            work(job)
        except FileNotFoundError as error:
            raise MissingInputError(f"evaluate.harness: {error}") from error
        except ConnectionError as error:
            raise UnavailableError(f"evaluate.harness: {' '.join(str(error).split())}") from error
    except PoclError as error:
        value = {"code": error.exit_code, "reason": str(error)}
        (path.parent / "error.json").write_text(json.dumps(value))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
