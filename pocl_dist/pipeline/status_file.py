"""`status.json`: how a run stands or ended, with a digest of its own, because it outlives the seal.

Launchers lose exit codes (torchrun gives 1, srun gave 0 after a lost node): the outcome must stand
in a file, and one can tell whether the file still says what was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json, digest_of, json_text
from pocl_dist.versions import RUN_FORMAT, versions


def write_status_file(path: Path, value: Mapping[str, JSONValue]) -> None:
    """Writes `value` with format, versions and digest."""
    sealed = {"format": RUN_FORMAT, **value, "versions": versions()}
    atomic_write_json(path, {**sealed, "digest": digest_of(cast("JSONValue", sealed))})


def read_status(path: Path) -> dict[str, JSONValue]:
    """Returns what `status.json` says.

    Raises MissingInputError (66) without one, MismatchError (78) for one that is damaged or not
    ours: every byte of it counts.
    """
    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
    except FileNotFoundError as error:
        raise MissingInputError(f"{path} does not exist: no run was started here") from error
    except (OSError, ValueError) as error:
        raise MismatchError(f"{path}: damaged, or not written by pocl_dist: {error}") from error
    if not isinstance(value, dict) or "digest" not in value or "exit_code" not in value:
        raise MismatchError(f"{path}: not written by this version of pocl_dist")
    rest = {key: item for key, item in value.items() if key != "digest"}
    if json_text(value) != text or digest_of(rest) != value["digest"]:
        raise MismatchError(f"{path}: changed after it was written (its digest differs)")
    return cast("dict[str, JSONValue]", value)


def outcome(root: Path) -> int:
    """Prints how the run in `root` ended and returns its exit code."""
    from pocl_dist.pipeline.run_lock import is_locked

    status = read_status(root / "status.json")
    print(json_text(status), end="")
    code = status["exit_code"]
    if isinstance(code, int):
        return code
    # "running": is somebody? A killed launcher, or an aborted collective, leaves no last word.
    return 75 if is_locked(root) else 71
