"""Dotted keys: flatten a config, pick the keys a step depends on, compare them with a file's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel

from pocl_dist.errors import MismatchError
from pocl_dist.files import JSONValue


def flatten(value: Mapping[str, JSONValue], prefix: str = "") -> dict[str, JSONValue]:
    """Returns {dotted key: leaf}; lists and empty mappings are leaves."""
    flat: dict[str, JSONValue] = {}
    for key, item in value.items():
        dotted = f"{prefix}{key}"
        if isinstance(item, dict) and item:
            flat |= flatten(item, dotted + ".")
        else:
            flat[dotted] = item
    return flat


def select_keys(config: BaseModel, prefixes: Iterable[str]) -> dict[str, JSONValue]:
    """Returns the dotted keys of `config` that equal one of `prefixes` or lie under it."""
    wanted = tuple(prefixes)
    flat = flatten(config.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if any(k == p or k.startswith(p + ".") for p in wanted)}


def compare_inputs(
    found: Mapping[str, JSONValue], expected: Mapping[str, JSONValue], made: Path
) -> None:
    """Raises MismatchError (78) naming every key in which `made` was made from other inputs."""
    differing = [
        f"{key}: it was made with {found.get(key)!r}, now {expected.get(key)!r}"
        for key in sorted(set(found) | set(expected))
        if found.get(key) != expected.get(key)
    ]
    if differing:
        raise MismatchError(
            f"{made} does not belong to this config:\n  "
            + "\n  ".join(differing)
            + "\nUse the earlier values, or another run_dir."
        )
