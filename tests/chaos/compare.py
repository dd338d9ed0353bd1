"""Two run directories side by side: everything that is a result, as digests by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from pocl_dist.files import digest_of, read_json_lines

# Result files whose bytes do not depend on time, place or number of attempts.
_FILES = (
    "export/*.safetensors",
    "init_student/*.safetensors",
    "difficulty/*.parquet",
    "generated/**/*.jsonl",
    "generated/**/*.parquet",
    "teacher_cache/*.safetensors",
    "eval/*/answers*.jsonl",
)
_VOLATILE = ("tokens_per_second", "peak_memory_bytes", "seconds", "bytes")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plan(path: Path) -> str:
    try:
        plan = json.loads(path.read_text())
    except ValueError:
        return "not readable"
    return digest_of([plan["ranking"], plan["stages"]])


def _rows(path: Path, kinds: tuple[str, ...]) -> str:
    rows = [row for row in read_json_lines(path) if row["kind"] in kinds]
    return digest_of(
        [{key: value for key, value in row.items() if key not in _VOLATILE} for row in rows]
    )


def fingerprint(root: Path) -> dict[str, str]:
    """Returns {result: digest}: weights, optimizer state, answers, scores, plan, step rows."""
    found = {
        path.relative_to(root).as_posix(): _digest(path)
        for pattern in _FILES
        for path in root.glob(pattern)
        if path.is_file()
    }
    newest = max(root.glob("checkpoints/step-*"), default=None)
    if newest is not None:
        for path in newest.glob("*.safetensors"):
            found[f"{newest.name}/{path.name}"] = _digest(path)
    if (root / "plan.json").exists():
        found["plan"] = _plan(root / "plan.json")
    if (root / "metrics.jsonl").exists():
        found["steps"] = _rows(root / "metrics.jsonl", ("step",))
        found["dev"] = _rows(root / "metrics.jsonl", ("dev", "stage"))
    return found


def differences(expected: dict[str, str], root: Path) -> list[str]:
    """Returns the names in which a run directory is not the undisturbed one; empty: identical."""
    found = fingerprint(root)
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def verify_problem(root: Path) -> str:
    """Returns what `pocl-dist verify` complains of, at the command line; empty if nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "pocl_dist", "verify", str(root)], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else f"verify: {done.stderr.strip()[:300]}"
