"""What the code knows, as Markdown: `<!-- generated: NAME -->` in a page stands for it.

Needs pydantic and PyYAML, nothing else: neither torch nor the packages of the passes.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pocl_dist.arguments import make_parser
from pocl_dist.config import Config, ScheduleConfig
from pocl_dist.config.loss_names import LOSSES
from pocl_dist.errors import EXIT_CODES

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

DOCS = Path(__file__).resolve().parents[1]
PACKAGE = DOCS.parent / "pocl_dist"
_MARKER = re.compile(r"<!-- generated: ([a-z-]+) -->")
_WORDS = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))

# ------------------------------------------------------------------------------------- config keys


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is ScheduleConfig else [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _bounds(metadata: list[object]) -> list[str]:
    """Returns the limits that stand beside a type, e.g. `≥ 1`."""
    found = []
    for item in metadata:
        inner = item.metadata if isinstance(item, FieldInfo) else [item]
        for part in inner:
            found += [
                f"{sign} {getattr(part, name)}"
                for name, sign in _BOUNDS
                if getattr(part, name, None) is not None
            ]
    return found


def _type(annotation: object, metadata: list[object]) -> str:
    """Returns a type in words, its limits behind it."""
    limits = "".join(f", {limit}" for limit in _bounds(metadata))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if any(ScheduleConfig in get_args(part) for part in get_args(arguments[0])):
            return "number, list with one number per stage, or `{schedule, start, end}`"
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        if any(ScheduleConfig in get_args(part) for part in arguments):
            return "number, list with one number per stage, or `{schedule, start, end}`"
        kinds = [_type(part, metadata) for part in arguments if part is not NoneType]
        return " or ".join([*kinds, *(["`null`"] if NoneType in arguments else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of: {_type(arguments[0], [])}"
    if origin is dict:
        return "keys and values"
    return _WORDS.get(annotation, "any value") + limits  # type: ignore[call-overload]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"default `{text.strip().removesuffix('...').strip()}`"


def _resume_effects() -> dict[str, str]:
    """Returns {key: what another value does when a run goes on}: the table of resume.md."""
    text = (DOCS / "resume.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*) \|$", text, re.MULTILINE))


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key that holds a value, in the order of the sections."""
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if inner:
            yield from config_keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _section_text(section: type[BaseModel], prefix: str, effects: dict[str, str]) -> Iterator[str]:
    """Yields the keys of a section, then its sections, each under a heading."""
    nested = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = _sections(field.annotation)
        if inner:
            nested.append((key, inner[0], field))
            continue
        effect = effects.get(key, effects.get(key.partition(".")[0], ""))
        name = f"`{key}`{{#{key.replace('.', '-')}}}"
        yield f"{name}\n: {_type(field.annotation, field.metadata)}; {_default(field)}\n"
        if field.description:
            yield f"  {_plain(field.description)}\n"
        if effect:
            yield f"  *Changed later:* {effect}.\n"
    for key, kind, field in nested:
        yield f"{'#' * (2 + key.count('.'))} {key}\n"
        yield _plain(field.description or kind.__doc__) + "\n"
        if NoneType in get_args(field.annotation):
            rest = "it must be written" if field.is_required() else "the default"
            yield f"The whole section may be `null` ({rest}).\n"
        yield from _section_text(kind, f"{key}.", effects)


def config_reference() -> str:
    """Returns every key: type and limits, default, meaning, what another value does later."""
    return "\n".join(_section_text(Config, "", _resume_effects()))


# -------------------------------------------------------------------------------------- other facts


def exit_codes() -> str:
    """Returns the table of `pocl-dist exit-codes`."""
    lines = ["| code | name | meaning | submit again? |", "|---|---|---|---|"]
    for row in EXIT_CODES:
        again = "yes" if row.is_retryable else ""
        lines.append(f"| {row.code} | {row.name} | {row.meaning} | {again} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Returns the help of every command."""
    (choices,) = (
        action.choices
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    parts = []
    for name, parser in choices.items():
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=88)
        parts.append(f"## {name}\n\n```text\n{parser.format_help().strip()}\n```\n")
    return "\n".join(parts)


def losses() -> str:
    """Returns the table of divergences: arguments, defaults, ranges, order in T."""
    lines = ["| `loss.name` | `loss.kwargs` | order in T | as published |", "|---|---|---|---|"]
    for name, spec in LOSSES.items():
        kwargs = ", ".join(
            f"`{key}` = {kwarg.default:g} in {kwarg.allowed()}"
            for key, kwarg in spec.kwargs.items()
        )
        lines.append(
            f"| [`{name}`](#{name}) | {kwargs} | {spec.temperature_order} "
            f"| {spec.published_order} |"
        )
    return "\n".join(lines) + "\n"


def modules() -> str:
    """Returns every module with the first line of its docstring, folder by folder."""
    folders: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        folder = str(path.parent.relative_to(PACKAGE)).removeprefix(".") or "pocl_dist"
        first = _plain(text.partition("\n\n")[0])
        if path.name == "__init__.py":
            folders.setdefault(folder, []).insert(0, first + "\n")
        else:
            folders.setdefault(folder, []).append(f"- `{path.name}`: {first}")
    return "\n".join(
        f"## {folder}/\n\n" + "\n".join(lines) + "\n" for folder, lines in folders.items()
    )


def layers() -> str:
    """Returns the layers of the house, the upper first, as the test of the imports has them."""
    tree = ast.parse((DOCS.parent / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS"
    )
    assert value is not None
    lines = ["| layer | holds |", "|---|---|"]
    for number, units in reversed(list(enumerate(ast.literal_eval(value)))):
        names = (f"`{unit}/`" if (PACKAGE / unit).is_dir() else f"`{unit}`" for unit in units)
        lines.append(f"| {number} | {' '.join(names)} |")
    return "\n".join(lines) + "\n"


GENERATED: dict[str, Callable[[], str]] = {
    "config-reference": config_reference,
    "exit-codes": exit_codes,
    "commands": commands,
    "losses": losses,
    "modules": modules,
    "layers": layers,
}


def fill_in(text: str) -> str:
    """Returns the page with its markers replaced; KeyError for one that nothing stands for."""
    return _MARKER.sub(lambda found: GENERATED[found[1]](), text)


def _on_source_read(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = fill_in(source[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Fills in the markers of every page that is read."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
