"""Python, packages and their known holes, the compiler. Nothing is imported to be looked at."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, error, ok, skipped, warning
from pocl_dist.cluster.doctor.visible_gpus import num_visible_gpus
from pocl_dist.guards import outdated_packages
from pocl_dist.trackers.registry import wanted_trackers

MAIN_PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "ray", "safetensors")
_ROOT = Path(__file__).resolve().parents[4]


def extras(case: Case) -> Iterator[Finding]:
    """Packages of extras that the config asks for: trackers, the lm-evaluation-harness."""
    names = wanted_trackers(case.config.log)
    tasks = case.config.evaluate.harness
    if tasks and find_spec("lm_eval") is None:
        yield error(64, "evaluate.harness: the package lm_eval is not installed")
    else:
        asked = [*names, *(["lm_eval"] if tasks else [])]
        yield ok(f"installed: {', '.join(asked)}" if asked else "the config asks for none")


def known_holes(case: Case) -> Iterator[Finding]:
    """Refused versions (77), and holes of other packages that the kept list knows."""
    refused = list(outdated_packages())
    for line in refused:
        yield error(77, line)
    listed = _ROOT / "docs" / "security" / "known_bad.json"
    if not listed.is_file():
        yield skipped(
            f"the list of known holes in other packages is not installed ({listed})",
            "run doctor from a checkout, or pip-audit",
        )
        return
    named = {line.partition(" ")[0] for line in refused}
    found = 0
    for row in json.loads(listed.read_text()):
        have = _version(row["package"])
        bound = row["fixed_in"]
        if have is None or bound is None or row["package"] in named or have >= Version(bound):
            continue
        found += 1
        yield warning(
            f"{row['package']} {have}: {row['id']}, fixed in {bound}",
            row["what"],
            f"pip install '{row['package']}>={bound}'",
        )
    if not refused and not found:
        yield ok("no installed package has a hole of the kept list")


def packages(case: Case) -> Iterator[Finding]:
    """What pocl_dist needs, against what is there; and against the versions that were tested."""
    try:
        needed = [Requirement(line) for line in requires("pocl_dist") or []]
    except PackageNotFoundError:
        yield skipped(
            "pocl_dist runs from a folder and is not installed: its requirements are not known"
        )
        needed = []
    problems = 0
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = _version(requirement.name)
        if have is None:
            problems += 1
            yield error(70, f"{requirement.name} is not installed ({requirement} is needed)")
        elif not requirement.specifier.contains(have, prereleases=True):
            problems += 1
            yield warning(
                f"{requirement.name} {have} is installed, {requirement} is needed",
                "It was never tried with this version.",
                f"pip install '{requirement}'",
            )
    have_line = ", ".join(f"{name} {_version(name) or 'missing'}" for name in MAIN_PACKAGES)
    if not problems:
        yield ok(f"Python {platform.python_version()}, {have_line}")
    yield from _against_tested()


def _against_tested() -> Iterator[Finding]:
    file = _ROOT / "constraints.txt"
    if not file.is_file():
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.MULTILINE))
    others = [
        f"{name} {have} (tested: {pins[name]})"
        for name in MAIN_PACKAGES
        if name in pins and (have := _version(name)) and have.release[:2] != _release(pins[name])
    ]
    if others:
        yield warning(
            f"other versions than those that were tested: {', '.join(others)}",
            "Results may differ, and so may what the packages accept.",
            f"pip install -c {file.name} ...",
        )


def _release(text: str) -> tuple[int, ...]:
    return Version(text).release[:2]


@cache  # the metadata of a package is a long text
def _version(name: str) -> Version | None:
    try:
        return Version(version(name))
    except (PackageNotFoundError, InvalidVersion):
        return None


def compiler(case: Case) -> Iterator[Finding]:
    """What compiles DeepSpeed's ops and the loss on this machine."""
    engine = case.config.engine
    cxx = os.environ.get("CXX", "g++")
    missing = [name for name in (cxx, "ninja") if shutil.which(name) is None]
    has_gpu = num_visible_gpus() > 0 or (
        case.options.has_shape and case.config.launch.gpus_per_node > 0
    )
    if not missing:
        nvcc = "" if not has_gpu else f", nvcc {shutil.which('nvcc') or 'missing'}"
        yield ok(f"{cxx} and ninja are here{nvcc}")
        return
    line = f"{' and '.join(missing)} not found"
    if engine.offload_optimizer != "none" and has_gpu:
        yield error(70, f"{line}, and engine.offload_optimizer compiles DeepSpeed's CPU Adam")
        return
    yield warning(
        line,
        "The loss is then not compiled on a CPU (slower), and no op of DeepSpeed can be built.",
        "install g++ and ninja on the nodes, or ignore this if they are there",
    )
