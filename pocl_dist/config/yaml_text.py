"""YAML as configs have it: scalars of YAML 1.2, no aliases, tags or repeated keys."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import cast

import yaml

from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue

MAX_DEPTH = 50  # of nesting; no section is deeper than four


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, without aliases, tags and repeated keys.

    YAML 1.1, PyYAML's default, reads `1e-4` as text, `off` as False, `017` as 15 and `1:30` as 90.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _complaint("aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _complaint(f"the tag {event.tag} is not allowed", event)
        if self._depth == MAX_DEPTH:
            raise _complaint("nested too deeply", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _complaint("a key must be a word", key_node)
            if key_node.value in seen:
                raise _complaint(f"key {key_node.value!r} is given twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _complaint(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    mark = cast("yaml.error.Mark", where.start_mark)
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number: to PyYAML alone `1e4` is text."""


# What a plain scalar means; anything else is text. Dates, octals and merge keys
# are no part of a config.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$",
        list("-+.0123456789"),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, source: str) -> JSONValue:
    """Returns what a YAML text holds; raises ConfigError (64) that names `source` and the place."""
    try:
        return cast("JSONValue", yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: not valid YAML: {problem}{where}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def to_yaml(value: JSONValue) -> str:
    """Returns the value as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
