"""The fenced blocks of the documentation, and in which class each command block is.

A comment above a block says it: `<!-- run: tiny -->` or `<!-- needs: gpu -->`; none: it is checked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
NEEDS = ("gpu", "cluster", "docker", "network", "root")
COMMAND_LANGUAGES = ("bash", "console")
_COMMENT = re.compile(r"<!-- (run|needs): ([a-z]+) -->")
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. `kind` is run, needs or checked; `need` says what it needs."""

    page: Path
    line: int
    language: str
    text: str
    kind: str
    need: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def commands(self) -> list[str]:
        """Returns the block's commands, continued lines joined; of a console those behind `$ `."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if shlex.split(line, comments=True)]


def pages() -> list[Path]:
    """Returns the Markdown files of the documentation."""
    elsewhere = ["README.md", "SECURITY.md", "launch/README.md", "docker/README.md"]
    return [*sorted(DOCS.rglob("*.md")), *(REPOSITORY / name for name in elsewhere)]


def blocks_of(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        indent, language, body = found.groups()
        before = text[: found.start()].rstrip("\n").rpartition("\n")[2].strip()
        comment = _COMMENT.fullmatch(before)
        kind, need = comment.groups() if comment else ("checked", "")
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, language, body, kind, need)


def command_blocks() -> list[Block]:
    """Returns all blocks of commands of all pages."""
    return [
        block
        for page in pages()
        for block in blocks_of(page)
        if block.language in COMMAND_LANGUAGES
    ]
