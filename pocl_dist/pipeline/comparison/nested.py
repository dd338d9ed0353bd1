"""`verify` of a comparison: every run in it, and that the table was made from these very runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from pocl_dist.files import JSONValue, digest_of, read_json, sha256_file
from pocl_dist.pipeline.manifest import NESTED

RESULT = "comparison.json"
_BESIDE = (".yaml", ".log")  # of a run directory: its config and its output


def nested_findings(root: Path, find_changes: Callable[[Path], list[str]]) -> Iterator[str]:
    """Yields the findings of each run, and what of the table is not about them."""
    for top in (root / name for name in NESTED):
        yield from _tree_findings(root, top, find_changes)
    if not (root / RESULT).is_file():
        return
    try:
        value = read_json(root / RESULT)
        digest = value.pop("digest")
        if digest_of(value) != digest:
            yield f"{RESULT}: was changed after it was made (its digest differs)"
        for arm in cast("list[dict[str, JSONValue]]", value["arms"]):
            for row in cast("list[dict[str, JSONValue]]", arm["runs"]):
                yield from _row_findings(root, row)
    except (KeyError, TypeError, ValueError) as error:
        yield f"{RESULT}: cannot be followed: {type(error).__name__}: {error}"


def _tree_findings(
    root: Path, folder: Path, find_changes: Callable[[Path], list[str]]
) -> Iterator[str]:
    """Looks at runs, the files beside them, and what belongs to none. Follows no link."""
    if folder.is_symlink() or not folder.is_dir():
        if folder.is_symlink() or folder.exists():
            yield f"{folder.relative_to(root)}: is no folder"
        return
    name = folder.relative_to(root).as_posix()
    if (folder / "status.json").exists():
        yield from (f"{name}/{line}" for line in find_changes(folder))
        return
    for path in sorted(folder.iterdir()):
        is_beside = path.suffix in _BESIDE and path.with_suffix("").is_dir()
        if path.is_symlink() or not (path.is_dir() or (path.is_file() and is_beside)):
            yield f"{path.relative_to(root)}: belongs to no run"
        elif path.is_dir():
            yield from _tree_findings(root, path, find_changes)


def _row_findings(root: Path, row: dict[str, JSONValue]) -> Iterator[str]:
    name, sealed = str(row["run"]), row["manifest_sha256"]
    if sealed is None:
        return
    if name.startswith("/") or ".." in name.split("/"):
        yield f"{RESULT}: the run {name!r} leaves {root}; it was not looked at"
        return
    manifest = root / name / "manifest.json"
    if not manifest.is_file():
        yield f"{RESULT}: {name} is missing"
    elif sha256_file(manifest) != sealed:
        yield f"{RESULT}: is not about {name} as it is; run `pocl-dist compare` again"
