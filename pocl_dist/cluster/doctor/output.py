"""Findings as a person reads them: aligned and coloured on a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from pocl_dist.cluster.doctor.examine import CONFIG, exit_code_of
from pocl_dist.cluster.doctor.finding import SEE_ABOVE, Finding
from pocl_dist.cluster.doctor.registry import CHECKS
from pocl_dist.errors import exit_code_row
from pocl_dist.guards import printable

_COLOURS = {"ok": "32", "warning": "33", "error": "31;1", "skipped": "2"}
_GROUPS = {CONFIG: "Config", **{check.name: check.group for check in CHECKS}}
_NAME_WIDTH = max(map(len, _GROUPS))
_MARK_WIDTH = len("warning")
_INDENT = 2 + _MARK_WIDTH + 2 + _NAME_WIDTH + 2


def text_of(findings: Sequence[Finding], is_terminal: bool, width: int) -> str:
    """Returns all findings by group, and a last line that says how the run would end."""
    lines: list[str] = []
    for group in dict.fromkeys(_GROUPS.values()):
        members = [finding for finding in findings if _GROUPS[finding.check] == group]
        if members:
            lines += ["", _coloured(group, "1", is_terminal)]
        told = [finding for finding in members if not finding.why.endswith(SEE_ABOVE)]
        for _, alike in groupby(told, key=_alike):
            lines += _lines(list(alike), is_terminal, width)
    blocked = [finding for finding in findings if finding.why.endswith(SEE_ABOVE)]
    if blocked:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(f.check for f in blocked))
        line = f"Not looked at until the errors above are mended: {names}"
        lines += ["", *_broken("", line, is_terminal, width)]
    return "\n".join([*lines[1:], "", *_summary(findings, is_terminal, width)])


def is_terminal() -> bool:
    """Returns whether the output is a terminal that takes colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Returns the width to which lines are broken on a terminal."""
    return max(60, min(120, shutil.get_terminal_size().columns))


def _lines(alike: Sequence[Finding], is_terminal: bool, width: int) -> Iterator[str]:
    """Yields findings with one reason and one remedy; checks skipped alike share a line."""
    first = alike[0]
    is_skipped = first.severity == "skipped"
    mark = _coloured(first.severity.ljust(_MARK_WIDTH), _COLOURS[first.severity], is_terminal)
    names = ", ".join(dict.fromkeys(finding.check for finding in alike))
    for finding in alike[:1] if is_skipped else alike:
        code = "" if finding.exit_code is None else f" [exit code {finding.exit_code}]"
        told = f"{finding.what}: {finding.why}" if is_skipped else finding.what
        head = f"  {mark}  {names.ljust(_NAME_WIDTH)}  "
        yield from _broken(head, printable(told) + code, is_terminal, width)
    why = "" if is_skipped else first.why
    how = "do:   " if is_skipped else "mend: "
    for label, text in (("why:  ", why), (how, first.how)):
        if text:
            yield from _broken(" " * _INDENT + label, printable(text), is_terminal, width)


def _alike(finding: Finding) -> tuple[str, ...]:
    """Returns what findings have in common that are told together."""
    name = "" if finding.severity == "skipped" else finding.check
    return (finding.severity, name, finding.why, finding.how)


def _broken(head: str, text: str, is_terminal: bool, width: int) -> Iterator[str]:
    """Yields a head and text behind it, in a pipe on one line, on a terminal in a column."""
    flat = " ".join(text.split())
    if not is_terminal:
        yield head + flat
        return
    indent = _INDENT if head else 0
    if head.lstrip().startswith(("why:", "mend:", "do:")):
        indent += len("mend: ")
    for number, line in enumerate(
        textwrap.wrap(flat, max(30, width - indent), break_on_hyphens=False) or [""]
    ):
        yield (head if number == 0 else " " * indent) + line


def _coloured(text: str, code: str, is_terminal: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if is_terminal else text


def _summary(findings: Sequence[Finding], is_terminal: bool, width: int) -> list[str]:
    counts = Counter(finding.severity for finding in findings)
    parts = [
        f"{counts[name]} {name}{'' if counts[name] == 1 else 's'}" for name in ("error", "warning")
    ]
    parts += [f"{counts['skipped']} not looked at", f"{counts['ok']} ok"]
    code = exit_code_of(findings)
    if code == 0:
        end = _coloured("the run would start", "32;1", is_terminal)
    else:
        row = exit_code_row(code)
        end = _coloured(
            f"the run would end with exit code {code}: {row.meaning}", "31;1", is_terminal
        )
    return [f"{', '.join(parts)}: {end}"]
