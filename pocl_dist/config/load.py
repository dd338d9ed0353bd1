"""YAML files and `section.key=value` overrides -> Config, with messages that name the dotted key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pocl_dist.config.checks import check_config
from pocl_dist.config.schema import Config
from pocl_dist.errors import ConfigError, MissingInputError
from pocl_dist.files import JSONValue

MAX_CONFIG_BYTES = 1 << 20
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


class _Loader(yaml.SafeLoader):
    """Safe YAML with the number and boolean rules of YAML 1.2, without aliases and repeated keys.

    YAML 1.1, PyYAML's default, reads `1e-4` as text and `off` as False.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float",
                                                                  "tag:yaml.org,2002:timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def find_config(path: str) -> Path:
    """Returns the file itself, or the one of that name among the configs that the package ships."""
    if Path(path).is_file():
        return Path(path)
    shipped = Path(path).name
    for folder in (PACKAGE_FOLDER / "configs", PACKAGE_FOLDER.parent / "configs"):
        if Path(path).parent in (Path("configs"), Path(".")) and (folder / shipped).is_file():
            return folder / shipped
    raise MissingInputError(f"config file {path} does not exist (looked at {Path(path).resolve()})")


def _parse_yaml(text: str, source: str) -> JSONValue:
    try:
        return cast("JSONValue", yaml.load(text, Loader=_Loader))  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def _read_file(path: Path) -> dict[str, JSONValue]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; is it a config?")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    value = _parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected keys and values")
    return value


def _merge(base: dict[str, JSONValue], over: Mapping[str, JSONValue]) -> dict[str, JSONValue]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        # A schedule is one value written in several keys: the later file replaces it whole.
        is_whole = isinstance(value, dict) and "schedule" in value
        if isinstance(value, dict) and isinstance(below, dict) and not is_whole:
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _parse_override(text: str) -> dict[str, JSONValue]:
    key, _, raw = text.partition("=")
    value = _parse_yaml(raw, key) if raw.strip() else None
    parts = key.strip().split(".")
    if not all(parts):
        raise ConfigError(f"{text!r}: an override is section.key=value")
    for part in reversed(parts):
        value = {part: value}
    return cast("dict[str, JSONValue]", value)


def _known_keys(model: type[BaseModel], path: Sequence[object]) -> list[str]:
    """Returns the keys that are allowed at `path`, descending through optional sections."""
    current = model
    for part in path:
        field = current.model_fields.get(str(part))
        if field is None:
            break
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            break
        current = sections[0]
    return list(current.model_fields)


def _message(detail: ErrorDetails) -> str:
    path = [part for part in detail["loc"] if not str(part).endswith("]")]
    if path and path[-1] in ("ScheduleConfig", "float"):  # branches of a union are not keys
        path = path[:-1]
    key = ".".join(str(part) for part in path)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(Config, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; allowed here: {', '.join(known)}"
        return f"{key}: unknown key{hint}"
    if detail["type"] == "missing":
        return f"{key}: is required"
    reason = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{key}: {detail['input']!r} is not allowed: {reason}"


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Returns the config of the files, layered left to right, with the overrides on top.

    Raises ConfigError (64) naming dotted key, value and what is allowed; MissingInputError (66) when a
    file is not there.
    """
    merged: dict[str, JSONValue] = {}
    for path in paths:
        merged = _merge(merged, _read_file(find_config(str(path))))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        lines = dict.fromkeys(_message(detail) for detail in error.errors())
        raise ConfigError("\n".join(lines)) from None
    check_config(config)
    return config


def dump_config(config: Config) -> str:
    """Returns the config, defaults included, as YAML that `load_config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
