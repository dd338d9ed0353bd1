"""Imports go down the five layers of the house, never sideways and never up."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pocl_dist"

# A unit is a folder or a module right under pocl_dist; units of one row never import one another.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("failpoints", "processes"),
    ("errors", "files"),
    ("guards", "list_digest", "versions"),
    ("config", "records", "display"),
    (
        "data",
        "models",
        "losses",
        "distributed",
        "metrics",
        "run_log",
        "trackers",
        "shard_files",
        "hosts",
        "free_port",
    ),
    ("difficulty", "curriculum", "teacher", "on_policy"),
    ("pipeline", "cluster"),
    ("arguments",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
BUNDLED = "bundled"  # rows, models and the scripts that made them; they stand outside of the house
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported_modules(source: str) -> list[str]:
    """Returns what a file imports of ours, below `pocl_dist.`; `TYPE_CHECKING` blocks included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "pocl_dist":
                found += [f"pocl_dist.{alias.name}" for alias in node.names]
            else:
                found.append(str(node.module))
    ours = [name.removeprefix("pocl_dist.") for name in found if name.startswith("pocl_dist.")]
    return [name for name in ours if name != "__version__"]


def unit_of(file: Path) -> str:
    """Returns the unit that a file, relative to the package, belongs to."""
    return file.parts[0].removesuffix(".py")


def violations(file: Path, source: str) -> list[str]:
    """Returns one line for each import of `file` that the rules of the house forbid."""
    mine = unit_of(file)
    found = []
    for name in imported_modules(source):
        theirs = name.partition(".")[0]
        if mine == theirs:
            continue
        if BUNDLED in (mine, theirs) or theirs not in LAYER_OF or mine not in LAYER_OF:
            found.append(f"{file} imports {name}")
        elif LAYER_OF[theirs] >= LAYER_OF[mine]:
            found.append(f"{file} (layer {LAYER_OF[mine]}) imports {name} ({LAYER_OF[theirs]})")
    if file.name == "__init__.py":
        folder = ".".join(file.parts[:-1])
        outside = [name for name in imported_modules(source) if not name.startswith(f"{folder}.")]
        found += [f"{file} imports {name}, which is not in its folder" for name in outside]
    return found


def test_every_import_goes_to_a_lower_layer() -> None:
    assert [line for file in FILES for line in violations(file, (PACKAGE / file).read_text())] == []


def test_every_unit_has_its_place_in_the_house() -> None:
    units = {unit_of(file) for file in FILES} - {"__init__", BUNDLED}
    assert units <= set(LAYER_OF)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("losses/x.py", "from pocl_dist.models.heads import lm_head"),
        ("data/x.py", "import pocl_dist.pipeline.plan"),
        ("models/x.py", "if TYPE_CHECKING:\n    from pocl_dist.data.encoding import Encoder"),
        ("curriculum/x.py", "def f():\n    from pocl_dist.difficulty.fusion import fuse"),
        ("files.py", "from pocl_dist import errors"),
        ("records.py", "from pocl_dist.config import Config"),
        ("pipeline/x.py", "from pocl_dist.bundled.tiny import make"),
        ("bundled/x.py", "from pocl_dist.models.loading import load_model"),
        ("losses/__init__.py", "from pocl_dist.errors import ConfigError"),
        ("pipeline/x.py", "from pocl_dist.cli import main"),
    ],
)
def test_a_forbidden_import_is_found_wherever_it_stands(file: str, source: str) -> None:
    assert violations(Path(file), source) != []


def _longest(trees: Iterable[tuple[Path, ast.Module]]) -> list[str]:
    return [
        f"{file}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60  # type: ignore[operator]
    ]


def test_no_function_is_longer_than_a_screen() -> None:
    trees = [(file, ast.parse((PACKAGE / file).read_text())) for file in FILES]
    assert _longest(trees) == []
