"""Every command of the documentation is one that this program, its Makefile or its files know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_dist.arguments import parse
from pocl_dist.config import load_words
from pocl_dist.errors import PoclError
from tests.docs_blocks import NEEDS, REPOSITORY, Block, blocks_of, command_blocks, pages

# What stands for a reader's own word in a command.
PLACEHOLDERS = {
    "CONFIG": "configs/tiny_cpu.yaml",
    "CONFIG.yaml": "configs/tiny_cpu.yaml",
    "RUN_DIR": "runs/x",
    "RUN": "runs/x",
    "N": "2",
    "G": "2",
    "SECONDS": "5",
}
# Programs that are not ours: only the paths in their words are looked at.
OTHERS = {
    "apptainer", "cat", "cd", "chmod", "docker", "echo", "exec", "export", "git", "head", "jq",
    "ls", "mkdir", "pip", "printf", "rm", "source", "tail", "touch",
}  # fmt: skip
WRAPPERS = ("srun", "torchrun", "python", "python3")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
_OURS = re.compile(r"(?:\./)?(?:configs|docs|launch|docker|benchmarks|tests|pocl_dist)/[\w./-]+")


def simple_commands(line: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell line, without variables before and redirects."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    is_target = False
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;"):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []
        elif set(word) <= set("<>"):
            is_target = True
        elif is_target:
            is_target = False
        else:
            words.append(word)


def _check_pocl_dist(words: list[str]) -> None:
    """Parses the words behind `pocl-dist`, and loads the config that they name."""
    arguments = parse([PLACEHOLDERS.get(word, word) for word in words])
    if "config" in arguments:
        load_words(arguments.config)


def check_command(words: list[str]) -> None:
    """Raises where a command names something that is not there."""
    program, *rest = words
    for word in words:
        path = word.partition("=")[2] or word
        assert not _OURS.fullmatch(path) or (REPOSITORY / path).exists(), f"{word} does not exist"
    if program in WRAPPERS and "pocl-dist" in rest:
        _check_pocl_dist(rest[rest.index("pocl-dist") + 1 :])
    elif program in WRAPPERS and "-m" in rest:
        module, *behind = rest[rest.index("-m") + 1 :]
        if module == "pocl_dist":
            _check_pocl_dist(behind)
        else:
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    elif program == "pocl-dist":
        _check_pocl_dist(rest)
    elif program == "make":
        wanted = {word for word in rest if "=" not in word}
        assert wanted <= TARGETS, f"no target {wanted - TARGETS} in the Makefile"
    elif program not in WRAPPERS:
        assert program in OTHERS, f"{program}: add it to OTHERS, or write it right"


def write_files_of(page: Path, folder: Path) -> None:
    """Writes the files that a page shows (yaml blocks headed `# NAME.yaml`), or only names."""
    # The reader's own file, whatever is in it.
    (folder / "mine.yaml").write_text("seed: 1\n", encoding="utf-8")
    for block in blocks_of(page):
        named = re.match(r"# ([\w-]+\.yaml)\n", block.text)
        if block.language == "yaml" and named:
            (folder / named[1]).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize("block", command_blocks(), ids=str)
def test_every_command_of_the_pages_is_understood(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block.kind != "needs" or block.need in NEEDS
    assert block.kind != "run" or block.need == "tiny"
    write_files_of(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = block.commands()
    assert commands
    for line in commands:
        for words in simple_commands(line):
            try:
                check_command(words)
            except SystemExit:
                pytest.fail(f"{block}: pocl-dist does not take: {line}")


@pytest.mark.parametrize(
    "line",
    [
        "pocl-dist run configs/tiny_cpu.yaml curriculum.num_stage=1",
        "pocl-dist run configs/tinny_cpu.yaml",
        "pocl-dist launch --target lsf CONFIG",
        "srun --nodes 2 pocl-dist doctor CONFIG --nods 3",
        "torchrun -m pocl_dist distil CONFIG",
        "cd x && pocl-dist verify",
        "make docz",
        "python -m tests.chao",
        "python benchmarks/bench_nothing.py",
        "poc-dist run CONFIG",
        "cat docs/nothing.md > out",
    ],
)
def test_a_command_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, PoclError)):
        for words in simple_commands(line):
            check_command(words)


def test_a_block_of_commands_says_its_language() -> None:
    looks_like = re.compile(r"^(\$ )?(pocl-dist|make|python|export) ", re.MULTILINE)
    untold = [
        str(block)
        for page in pages()
        for block in blocks_of(page)
        if not block.language and looks_like.search(block.text)
    ]
    assert not untold


def test_the_guides_have_commands_that_are_really_run() -> None:
    run = {block.page.stem for block in command_blocks() if block.kind == "run"}
    assert {"quickstart", "data", "models", "methods", "recipes", "cluster"} <= run
