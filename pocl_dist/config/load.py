"""YAML files and `section.key=value` overrides -> Config; messages name the dotted key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pocl_dist.config.checks import check_config
from pocl_dist.config.schema import Config
from pocl_dist.config.shipped import find_config
from pocl_dist.config.yaml_text import parse_yaml, to_yaml
from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue
from pocl_dist.guards import printable, shown

MAX_CONFIG_BYTES = 1 << 20
MAX_MISTAKES = 20  # told at once; a file of another program has thousands


def _read_file(path: Path) -> dict[str, JSONValue]:
    with path.open("rb") as handle:
        content = handle.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; is it a config?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected keys and values")
    return value


def _merge(base: dict[str, JSONValue], over: Mapping[str, JSONValue]) -> dict[str, JSONValue]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        # A schedule is one value written in several keys: the later file replaces it whole. So does
        # `{}`, the only way to drop what a lower layer wrote into `loss.kwargs`.
        is_whole = isinstance(value, dict) and (not value or value.keys() >= {"schedule", "start"})
        if isinstance(value, dict) and isinstance(below, dict) and not is_whole:
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _parse_override(text: str) -> dict[str, JSONValue]:
    key, _, raw = text.partition("=")
    value = parse_yaml(raw, key) if raw.strip() else None
    parts = key.strip().split(".")
    if not all(parts):
        raise ConfigError(f"{text!r}: an override is section.key=value")
    for part in reversed(parts):
        value = {part: value}
    return cast("dict[str, JSONValue]", value)


def _sections_of(annotation: object) -> list[type[BaseModel]]:
    """Returns the sections that a field may hold, found through `| None` and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_of(argument)]


def _known_keys(path: Sequence[object]) -> list[str]:
    """Returns the keys that are allowed in the section at `path`; empty when it is no section."""
    current: type[BaseModel] = Config
    for part in path:
        field = current.model_fields.get(str(part))
        sections = _sections_of(field.annotation) if field else []
        if not sections:
            return []
        current = sections[0]
    return list(current.model_fields)


def _shown(value: object) -> str:
    """Returns the value as YAML would have it, on one line of at most 80 characters."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shown(value)


def _reason(detail: ErrorDetails, path: Sequence[object]) -> str:
    kind = detail["type"]
    if kind in ("model_type", "dict_type"):
        known = _known_keys(path)
        return (
            f"must be keys and values ({', '.join(known)})" if known else "must be keys and values"
        )
    if kind in _REASONS:
        return _REASONS[kind]
    # "Input should be greater than 0" -> "must be greater than 0"
    return re.sub(r"^(?:Input|List|String) should ", "must ", detail["msg"]).replace(
        " after validation", ""
    )


_REASONS = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not hold a NUL",
    "list_type": "must be a list, written [first, second]",
    "invalid_key": "keys must be text",
}


def _message(detail: ErrorDetails) -> str:
    # Branches of a union and "the key, not its value" stand in brackets: they are no keys.
    path = [part for part in detail["loc"] if not str(part).endswith("]")]
    key = printable(".".join(str(part) for part in path))[:80]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; allowed here: {', '.join(known)}"
        return f"{key}: unknown key{hint}"
    if detail["type"] == "missing":
        return f"{key}: is required"
    return f"{key}: {_shown(detail['input'])} is not allowed: {_reason(detail, path)}"


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Returns the config of the files, layered left to right, with the overrides on top.

    Raises ConfigError (64) naming dotted key, value and what is allowed; MissingInputError (66)
    when a file is not there.
    """
    merged: dict[str, JSONValue] = {}
    for path in paths:
        merged = _merge(merged, _read_file(find_config(str(path))))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return _validated(merged)


def _validated(value: Mapping[str, JSONValue]) -> Config:
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = list(dict.fromkeys(_message(detail) for detail in details[:MAX_MISTAKES]))
        if len(details) > MAX_MISTAKES:
            lines.append(f"... and {len(details) - MAX_MISTAKES} mistakes more")
        raise ConfigError("\n".join(lines)) from None
    check_config(config)
    return config


def replaced(config: Config, keys: Mapping[str, JSONValue]) -> Config:
    """Returns the config with other values under the dotted `keys`; raises as `load_config`."""
    value = cast("dict[str, JSONValue]", config.model_dump(mode="json"))
    for key, item in keys.items():
        *parents, leaf = key.split(".")
        section = value
        for name in parents:
            section = cast("dict[str, JSONValue]", section[name])
        section[leaf] = item
    return _validated(value)


def load_words(words: Sequence[str]) -> Config:
    """Returns the config of a command line: files and overrides in any order."""
    # A path may hold a "=" too, but has a slash or a dot before it that no key has.
    is_override = re.compile(r"[A-Za-z_][\w.]*=").match
    files = [word for word in words if not is_override(word)]
    return load_config(files, [word for word in words if is_override(word)])


def dump_config(config: Config) -> str:
    """Returns the config, defaults included, as YAML that `load_config` reads back equal."""
    return to_yaml(config.model_dump(mode="json"))
