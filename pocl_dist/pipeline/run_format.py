"""Which run directories this version may go on with. Looks only; nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pocl_dist.display.output import warn
from pocl_dist.errors import ConfigError, MismatchError
from pocl_dist.files import TEMPORARY, JSONValue, read_json
from pocl_dist.pipeline.status_file import read_status
from pocl_dist.versions import RUN_FORMAT, versions

FILES = (
    "status.json",
    "config.yaml",
    "manifest.json",
    "manifest.json.sha256",
    "lock",
    "control/*",
    "launch/*",
    "timings.json",
    "models.json",
    "quarantine.jsonl",
    "rows/*",
    "init_student/*",
    "generated/*",
    "difficulty/*",
    "plan.json",
    "plan-ranking.parquet",
    "teacher_cache/*",
    "checkpoints/*",
    "nonfinite/*",
    "metrics.jsonl",
    "trackers/*",
    "export/*",
    "eval/*",
    "report.json",
    "report.html",
    "shared/*",
    "shared.yaml",
    "shared.log",
    "runs/*",
    "comparison.json",
    "comparison.md",
    "comparison.html",
)
"""All that a run writes into its directory (`*`: anything below); scratch lies elsewhere."""

_SCRATCH_VARIABLES = (
    "TMPDIR",
    "RAY_TMPDIR",
    "POCL_DIST_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
)


def check_run_directory(root: Path, is_strict: bool) -> None:
    """Raises as `look_at_run_directory` does; what it returns is printed as warnings."""
    for warning in look_at_run_directory(root, is_strict):
        warn(warning)


def look_at_run_directory(root: Path, is_strict: bool) -> list[str]:
    """Returns warnings; raises before anything is written where another program or version wrote.

    ConfigError (64): `run_dir` is no folder, or scratch would lie in it. MismatchError (78):
    foreign files, a damaged or foreign status.json or manifest.json, another format; with
    `is_strict` another code or package version too, which otherwise is a warning.
    """
    _check_scratch(root)
    try:
        existing = root
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError(f"run_dir: {root}: {existing} is a file, not a folder")
        names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    except OSError as error:
        raise ConfigError(f"run_dir: {root} cannot be used: {error.strerror}") from error
    status, manifest = _read(root / "status.json"), _read(root / "manifest.json")
    if status is None and manifest is None:
        ours = {name.partition("/")[0] for name in FILES}
        foreign = [name for name in names if name not in ours and not name.startswith(TEMPORARY)]
        if foreign:
            raise MismatchError(
                f"{root} is no run directory: it holds {', '.join(foreign[:3])}"
                f"{' and more' if foreign[3:] else ''}, but neither status.json nor "
                "manifest.json; choose a run_dir that is empty or not there yet"
            )
    return _check_versions(root, manifest if status is None else status, is_strict)


def _read(path: Path) -> Mapping[str, JSONValue] | None:
    """Returns what `path` says, None without it; MismatchError (78) for another format."""
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{error}; `pocl-dist verify` tells what else is damaged") from error
    if value.get("format") != RUN_FORMAT:
        found = value.get("format", "none")
        raise MismatchError(
            f"{path}: written by another program or version of pocl_dist (its format is {found}, "
            f"that of this version {RUN_FORMAT}); use that version, or another run_dir"
        )
    return read_status(path) if path.name == "status.json" else value


def _check_versions(
    root: Path, record: Mapping[str, JSONValue] | None, is_strict: bool
) -> list[str]:
    before = cast("Mapping[str, JSONValue]", (record or {}).get("versions") or {})
    differing = [
        f"{name} {_short(before.get(name))} -> {_short(now)}"
        for name, now in versions().items()
        if before and before.get(name) != now
    ]
    if differing and is_strict:
        raise MismatchError(
            f"{root} was written by other versions: {', '.join(differing)} "
            "(resume.strict_versions is true)"
        )
    if not differing:
        return []
    return [
        f"{root} was written by other versions: {', '.join(differing)}; the results may differ "
        "(resume.strict_versions: true refuses this)"
    ]


def _short(value: object) -> str:
    return str(value)[:12]


def _check_scratch(root: Path) -> None:
    for name in _SCRATCH_VARIABLES:
        folder = os.environ.get(name)
        if folder and Path(folder).resolve().is_relative_to(root.resolve()):
            raise ConfigError(
                f"run_dir: ${name} ({folder}) lies in {root}; scratch and caches must lie elsewhere"
            )
