"""The order of system calls around each rename: file, folder and parent are on disk (power cuts).

A power cut cannot be tried here, but what survives one can be read off: a renamed file or folder
whose content was not fsynced before, or whose new name was not fsynced after, may be lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.chaos.lab import Lab
from tests.chaos.result import Result

RESULTS = ("export", "checkpoints")


def record_calls(log: Path) -> Callable[[], None]:
    """Writes every fsync and rename of this process to `log`; returns what undoes it."""
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note(*words: str) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps(words) + "\n")

    def noted_fsync(handle: int) -> None:
        note("fsync", os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def noted(move: Callable) -> Callable:
        def wrapper(source: str, target: str, **options: object) -> None:
            note("rename", os.path.realpath(source), os.path.realpath(target))
            move(source, target, **options)

        return wrapper

    os.fsync, os.replace, os.rename = noted_fsync, noted(replace), noted(rename)  # type: ignore

    def undo() -> None:
        os.fsync, os.replace, os.rename = fsync, replace, rename

    return undo


def problems(calls: list[list[str]], files_of: Callable[[str], list[str]]) -> list[str]:
    """Returns the renames that a power cut could undo or empty; `files_of` a renamed folder."""
    synced: set[str] = set()
    found = []
    for at, (kind, *paths) in enumerate(calls):
        if kind == "fsync":
            synced.add(paths[0])
            continue
        source, target = paths
        if Path(target).name.startswith(".tmp-"):
            continue  # on its way to be removed
        for path in [source, *(f"{source}/{name}" for name in files_of(target))]:
            if path not in synced:
                found.append(f"{path} was renamed to {target}, but not fsynced before")
        if source in synced:
            synced.add(target)
        parent = str(Path(target).parent)
        if ["fsync", parent] not in calls[at + 1 : at + 10]:
            found.append(f"{parent} was not fsynced after the rename to {target}")
    return found


def _train_noted(config_path: str, folder: str) -> None:
    from tests.chaos.lab import _train

    record_calls(Path(folder) / f"calls-{os.environ['RANK']}.jsonl")
    _train(config_path, {})


def _calls(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(lab: Lab) -> Result:
    """Trains on one rank with all calls noted, and reads them."""
    from tests.ranks import run_ranks

    result = lab.result("a power cut at any time: fsync before, and after, every rename")
    config = lab.training_config(lab.place("write-order"))
    run_dir = config.parent / "run"
    run_ranks(_train_noted, 1, str(config), str(config.parent))
    calls = [
        call
        for call in _calls(config.parent / "calls-0.jsonl")
        if call[-1].startswith(str(run_dir)) and "/control/" not in call[-1]
    ]

    def files_of(target: str) -> list[str]:
        folder = Path(target)
        if not folder.is_dir():
            return []
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    found = problems(calls, files_of)
    for call in calls:
        if call[0] == "rename" and "/.tmp-" not in call[2]:
            own = [text for text in found if f"to {call[2]}" in text]
            result.count(f"{len(own)} problems, e.g. {own[0]}" if own else "")
    result.notes.append(f"{len(calls)} calls of one training read")
    return result
