"""Fills the templates in launch/, which are real shell files that a linter reads as they lie.

A placeholder is `@name:filter@`. The filter says what may stand there:

    word    one value, shell-quoted
    words   a list, each shell-quoted, with spaces between
    plain   one value where nothing can be quoted (`#SBATCH --nodes=@nodes:plain@`): letters, digits
            and `_ . , : / = @ % + -` only
    lines   a list of shell lines as they are, in place of a comment line `#@name:lines@`
    exports a mapping, as one `export NAME=value` per line, in place of a comment line
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from pocl_dist.config.shipped import launch_file
from pocl_dist.errors import ConfigError
from pocl_dist.guards import shown

Value = str | int | Sequence[str] | Mapping[str, str]

_PLACEHOLDER = re.compile(r"#?@([a-z][a-z0-9_]*):(word|words|plain|lines|exports)@")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/=@%+-]+")


def fill(template: str, values: Mapping[str, Value]) -> str:
    """Returns the text of launch/`template` with its placeholders filled.

    Raises ConfigError (64) for a value that cannot stand where it belongs. A placeholder without
    value and a value without placeholder are bugs of ours: ValueError.
    """
    return fill_text(launch_file(template).read_text(encoding="utf-8"), values, template)


def fill_text(text: str, values: Mapping[str, Value], template: str) -> str:
    """Returns `text` with its placeholders filled; `template` names it in messages."""
    asked = {match[1] for match in _PLACEHOLDER.finditer(text)}
    if asked != values.keys():
        raise ValueError(
            f"{template}: without a value: {sorted(asked - values.keys())}; "
            f"without a place: {sorted(values.keys() - asked)}"
        )

    def put(match: re.Match[str]) -> str:
        name, kind = match[1], match[2]
        text = _filtered(name, kind, values[name])
        has_mark = match[0].startswith("#")
        if has_mark != (kind in ("lines", "exports")):
            raise ValueError(f"{template}: {match[0]}: only lines and exports replace a comment")
        return text

    return _PLACEHOLDER.sub(put, text)


def _filtered(name: str, kind: str, value: Value) -> str:
    if kind == "exports" and isinstance(value, Mapping):
        return "\n".join(f"export {key}={shlex.quote(item)}" for key, item in value.items())
    if kind in ("words", "lines") and isinstance(value, Sequence) and not isinstance(value, str):
        return "\n".join(value) if kind == "lines" else shlex.join(value)
    if kind in ("word", "plain") and isinstance(value, str | int):
        text = str(value)
        if kind == "word":
            return shlex.quote(text)
        if not _PLAIN.fullmatch(text):
            raise ConfigError(
                f"{name}: {shown(text)} cannot stand in a job file: letters, digits and "
                "_ . , : / = @ % + - only"
            )
        return text
    raise ValueError(f"{name}: {type(value).__name__} is no value for the filter {kind}")
