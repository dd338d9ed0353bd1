"""What the pages say of the code is so: keys, files, functions, messages, formulas."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from pocl_dist.config import Config, LaunchConfig, load_config
from pocl_dist.config.loss_names import LOSSES
from pocl_dist.losses import get_divergence
from pocl_dist.pipeline.resume_rules import schema_keys
from tests.docs_blocks import DOCS, REPOSITORY, blocks_of, pages
from tests.test_layers import LAYERS

sys.path.insert(0, str(DOCS / "extensions"))
import generated

PACKAGE = REPOSITORY / "pocl_dist"
# A name in backticks is a config key when it begins with a section.
_KEY = re.compile(rf"`((?:{'|'.join(Config.model_fields)})\.[a-z_][a-z0-9_.]*)[`=:]")
_OTHERS = {"engine.save_checkpoint", "checkpoint.before_rename"}  # DeepSpeed's, a failpoint
_FILE_SUFFIXES = (".json", ".jsonl", ".py", ".md", ".yaml", ".html", ".parquet", ".sh")
# `folder/file.py:name`, `folder/file.py`, `configs/name.yaml`
_PLACE = re.compile(r"`([\w./-]+\.(?:py|yaml|sh|md))(?::(\w+))?`")


def all_keys() -> list[str]:
    """Returns every key of the config, those of the machines too."""
    keys = [key for key in schema_keys() if key != "launch"]
    return [*keys, *schema_keys(LaunchConfig, "launch.")]


# ---------------------------------------------------------------------------------- generated pages


def test_the_config_reference_has_every_key_exactly_once() -> None:
    text = generated.config_reference()
    told = re.findall(r"^`([a-z0-9_.]+)`\{#[a-z0-9_-]+\}$", text, re.MULTILINE)
    assert sorted(told) == sorted(all_keys())
    assert told == list(generated.config_keys())


def test_the_config_reference_tells_type_range_default_and_what_resume_does() -> None:
    text = generated.config_reference()
    entries = dict(re.findall(r"^`([a-z0-9_.]+)`\{#.*\}\n: (.*)$", text, re.MULTILINE))
    assert entries["curriculum.num_stages"] == "whole number, ≥ 1; default `4`"
    assert entries["engine.zero_stage"] == "`0`, `1`, `2`, `3`; default `3`"
    assert entries["run_dir"] == "text; **required**"
    assert entries["data.limit"] == "whole number, ≥ 1 or `null`; default `null`"
    assert entries["teacher.max_truncation_error"] == "number, > 0, ≤ 1; default `0.1`"
    assert entries["curriculum.temperature"].startswith("number, list with one number per stage")
    assert text.count("*Changed later:*") == len(all_keys())


def test_every_marker_of_a_page_is_generated() -> None:
    for page in pages():
        names = re.findall(r"<!-- generated: ([a-z-]+) -->", page.read_text(encoding="utf-8"))
        for name in names:
            if name != "NAME":
                assert generated.GENERATED[name]().strip(), f"{page}: {name}"


def test_the_commands_page_shows_the_help_of_every_command() -> None:
    text = generated.commands()
    assert all(f"## {name}\n" in text for name in ("run", "doctor", "launch", "score", "verify"))


# ------------------------------------------------------------------------- what the pages mention


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_config_key_that_a_page_names_exists(page: Path) -> None:
    known = set(all_keys()) | {key.rpartition(".")[0] for key in all_keys()} | _OTHERS
    named = {
        key
        for key in _KEY.findall(page.read_text(encoding="utf-8"))
        if not key.endswith(_FILE_SUFFIXES)
    }
    assert {key for key in named if key.removesuffix(".*") not in known} == set()


def _names_of(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_exists(page: Path) -> None:
    for name, function in _PLACE.findall(page.read_text(encoding="utf-8")):
        if "/" not in name or re.search(r"\b(DIR|RUN|NAME)\b", name):
            continue  # a file of the reader, or of another project
        found = [base / name for base in (PACKAGE, REPOSITORY) if (base / name).exists()]
        is_foreign = name.startswith(("distillkit/", "tools/", "scripts/", "minillm/"))
        assert found or is_foreign, f"{name} does not exist"
        if function:
            assert function in _names_of(found[0]), f"{name} has no {function}"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_stands_in_the_navigation() -> None:
    listed = re.findall(
        r"^(?:.* <)?([\w-]+)>?$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    alone = {"index", "modules"}  # the second is linked from architecture.md
    missing = {page.stem for page in DOCS.glob("*.md")} - set(listed) - alone
    assert not missing, "add them to a toctree of docs/index.md"


def test_every_part_of_another_file_that_a_page_includes_is_there() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, options in re.findall(r"^```\{include\} (\S+)\n((?::.*\n)*)```", text, re.M):
            source = (page.parent / name).read_text(encoding="utf-8")
            has_links = name != "../README.md" or ":relative-docs: docs/" in options
            assert has_links, f"{page}: without relative-docs its links lead nowhere"
            for line in re.findall(r"^:(?:start-after|end-before): (.*)$", options, re.M):
                assert source.count(line.strip('"')) == 1, f"{page}: {line}"


def test_every_yaml_block_of_the_pages_is_a_config(tmp_path: Path) -> None:
    for page in sorted(DOCS.rglob("*.md")):
        for block in blocks_of(page):
            if block.language == "yaml":
                path = tmp_path / "block.yaml"
                path.write_text(block.text, encoding="utf-8")
                load_config(["configs/tiny_cpu.yaml", path])


def test_the_layers_of_the_architecture_page_are_those_of_the_test_of_the_imports() -> None:
    told = [set(re.findall(r"`(\w+)/?`", line)) for line in generated.layers().splitlines()[2:]]
    assert told == [set(row) for row in reversed(LAYERS)]


# ------------------------------------------------------------------------------------------- errors


@cache
def _texts_of_the_code() -> str:
    """Returns all texts of the package; what is filled in later is `…`."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


# Messages that the code puts together from two texts.
_JOINED = {
    "disk full while writing": ("disk full", " while writing "),
    "unknown key; did you mean": ("unknown key", "; did you mean "),
}


def _messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^`(.+)`$", text, re.MULTILINE)


@pytest.mark.parametrize("message", _messages())
def test_every_message_of_the_troubleshooting_page_is_one_of_the_code(message: str) -> None:
    for whole, parts in _JOINED.items():
        message = message.replace(whole, "…".join(parts))
    fragments = [part for part in message.split("…") if len(part.strip(" :;,().")) > 3]
    assert fragments, "nothing but placeholders"
    missing = [part for part in fragments if part.strip() not in _texts_of_the_code()]
    assert not missing


def test_the_troubleshooting_page_has_a_section_for_every_exit_code_of_an_error() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sections = {int(code) for code in re.findall(r"^## (\d+):", text, re.MULTILINE)}
    assert sections == {64, 65, 66, 69, 70, 71, 73, 74, 75, 76, 77, 78}
    assert len(_messages()) > 60


# ------------------------------------------------------------------------------------------- losses


def _formula(name: str) -> str:
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.mark.parametrize("name", LOSSES)
def test_the_formula_of_the_losses_page_is_that_of_the_code(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    logits_2V = 2 * torch.randn(2, 50, generator=generator, dtype=torch.float64)
    student_logprobs_NV, teacher_logprobs_NV = logits_2V.log_softmax(-1).unsqueeze(1)
    divergence = get_divergence(name)
    known = {"s": student_logprobs_NV[0].exp(), "t": teacher_logprobs_NV[0].exp()}
    scope: dict[str, object] = {**known, "log": torch.log, **divergence.kwargs}
    exec(_formula(name), {}, scope)
    value_N, gradient_NV = divergence.with_gradient(student_logprobs_NV, teacher_logprobs_NV)
    torch.testing.assert_close(scope["value"], value_N[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scope["gradient"], gradient_NV[0], rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------- how it is made


def test_the_environment_of_the_documentation_is_the_extra_and_what_the_config_needs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^DOCS_PACKAGES := (.*)$", makefile, re.MULTILINE)
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    (extra,) = re.findall(r'"docs": \[(.*?)\]', setup, re.DOTALL)
    wanted = set(re.findall(r'"([a-z-]+)>=', extra)) | {"pydantic", "pyyaml"}
    assert set(line.split()) == wanted
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower()
    assert all(f"\n{name}==" in pins for name in wanted)


def test_no_page_and_no_style_asks_another_host_for_anything() -> None:
    sources = [*(DOCS / "static").iterdir(), *(DOCS / "images").iterdir(), DOCS / "conf.py"]
    for path in sources:
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://", text), path
