"""Renders a chat template as transformers does, without importing it (seconds, and torch).

The sandbox, filters and functions that a template may use are those of transformers' chat
templates; a test compares the texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import version

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from packaging.version import Version

from pocl_dist.errors import RefusedError

SAFE_JINJA2 = "3.1.6"


class _Generation(Extension):
    """`{% generation %}` marks what the model writes; for the text it means nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return str(caller())


def _raise(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Namespace(Namespace):
    """jinja2's, without the names through which a template could reach Python itself."""

    def __init__(*args: object, **values: object) -> None:
        for name in dict(*args[1:], **values):  # type: ignore[call-overload]
            _check_name(str(name))
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise TemplateError(f"the name {name!r} is not allowed in a chat template")


def _check_sandbox() -> None:
    if Version(version("jinja2")) < Version(SAFE_JINJA2):
        raise RefusedError(
            f"jinja2 {version('jinja2')}: a chat template can leave its sandbox "
            f"(CVE-2025-27516); install jinja2 >= {SAFE_JINJA2}"
        )


@cache
def _compiled(template: str) -> Template:
    _check_sandbox()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = lambda *args, **values: dict(*args, **values)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]
) -> str:
    """Returns the text of messages up to where the model answers.

    Raises jinja2.TemplateError for a template that is broken or refuses the messages, RefusedError
    (77) when the sandbox is known to leak.
    """
    return _compiled(template).render(
        messages=list(messages), add_generation_prompt=True, **special_tokens
    )
