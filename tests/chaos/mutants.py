"""The safety code with one part taken out at a time: some check must fail (T27)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.lab import PACKAGE, Lab
from tests.chaos.result import Result

ROOT = PACKAGE.parent


@dataclass(frozen=True)
class Mutant:
    """What is taken out, by regular expressions over one file, and the check that must notice."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    check: tuple[str, ...]  # of `python -m`


_CHAOS = ("tests.chaos",)
_PYTEST = ("pytest", "-q", "-x", "-p", "no:cacheprovider")
MUTANTS = (
    Mutant(
        "no fsync of a file", "files.py", ((r"os\.fsync\(handle\.fileno\(\)\)", "pass"),),
        (*_CHAOS, "write_order"),
    ),
    Mutant(
        "no fsync of a folder", "files.py", ((r"os\.fsync\(handle\)\n", "pass\n"),),
        (*_CHAOS, "write_order"),
    ),
    Mutant(
        "files written in place", "files.py",
        (
            (r"temporary = path\.with_name\(.*\)\n", "temporary = path\n"),
            (r"temporary\.unlink\(missing_ok=True\)", "pass"),
        ),
        (*_CHAOS, "enospc"),
    ),
    Mutant(
        "no hash check of checkpoints", "distributed/checkpoint*.py",
        ((r"if sha256_file\(path\) != file\.sha256:", "if False:"),),
        (*_CHAOS, "damage"),
    ),
    Mutant(
        "no seal of a checkpoint's manifest", "distributed/checkpoint*.py",
        ((r"if seal != seal_of\(content\)\.encode\(\):", "if False:"),),
        (*_CHAOS, "damage"),
    ),
    Mutant(
        "no fence before the commit", "pipeline/run_lock.py",
        ((r"if _number\(held\) != int\(own\):", "if False:"),),
        (*_PYTEST, "tests/test_run_lock.py"),
    ),
    Mutant(
        "no lock", "pipeline/run_lock.py",
        ((r"if _is_held\(path, held, is_patient=True\):", "if False:"),),
        (*_PYTEST, "tests/test_run_lock.py"),
    ),
    Mutant(
        "verify compares no hash", "pipeline/verify.py",
        ((r'if contents\.sha256\[name\] == row\["sha256"\]:', "if True:"),),
        (*_PYTEST, "tests/test_verify.py"),
    ),
)  # fmt: skip


def _plant(mutant: Mutant, folder: Path) -> str:
    """Copies the project with the mutant in it; returns what is wrong with the mutant itself."""
    for name in ("pocl_dist", "tests", "launch", "configs", "pyproject.toml"):
        source, target = ROOT / name, folder / name
        ignored = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    for old, new in mutant.changes:
        num_changed = 0
        for path in (folder / "pocl_dist").glob(mutant.file):
            text, num = re.subn(old, new, path.read_text(encoding="utf-8"))
            path.write_text(text, encoding="utf-8")
            num_changed += num
        if num_changed == 0:
            return f"{mutant.name}: {old!r} is not in {mutant.file} any more; rewrite the mutant"
    return ""


def _is_noticed(mutant: Mutant, folder: Path, seed: int) -> tuple[bool, str]:
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "CHAOS_SCALE": "0.06", "CHAOS_SEED": str(seed),
        "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *mutant.check],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    # "broke off" is no finding: the check has to say what it saw.
    is_finding = done.returncode == 1 and "broke off" not in done.stdout
    return is_finding, (done.stdout + done.stderr)[-300:]


def run(lab: Lab) -> Result:
    """Plants each mutant in a copy of the project and runs the check that belongs to it."""
    result = lab.result("a part of the safety code removed; survived: a check notices")
    for index, mutant in enumerate(MUTANTS):
        folder = lab.place(f"mutant-{index}")
        stale = _plant(mutant, folder)
        if stale:
            result.count(stale)
            continue
        is_noticed, output = _is_noticed(mutant, folder, lab.seed)
        result.count("" if is_noticed else f"{mutant.name}: nobody noticed: {output}")
    result.notes.append("; ".join(mutant.name for mutant in MUTANTS))
    return result
