"""Runs every benchmark, one after the other, and writes RESULTS.md from their JSON.

Usage: python benchmarks/run_all.py [NAME ...]     names: see BENCHMARKS; without any, all of them.
A named run replaces those sections only; the figures of the others stay as they were, with their
date. Raw JSON of the last run of each lies in `runs/benchmarks/`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RAW = HERE.parent / "runs" / "benchmarks"
RESULTS = HERE / "RESULTS.md"


@dataclass(frozen=True)
class Goal:
    """One figure of a benchmark's JSON and what was asked of it."""

    text: str
    path: str  # keys and list indices, dotted
    sign: str  # "<=" or ">="
    bound: float

    def line(self, answer: dict[str, object]) -> str:
        """Returns the table row; a figure that is missing says so."""
        value: object = answer
        for key in self.path.split("."):
            if isinstance(value, list):
                value = value[int(key)] if int(key) < len(value) else None
            else:
                value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            return f"| {self.text} | {self.sign} {self.bound:g} | none | no figure |"
        is_met = value <= self.bound if self.sign == "<=" else value >= self.bound
        verdict = "yes" if is_met else "**no**"
        return f"| {self.text} | {self.sign} {self.bound:g} | {value:.3g} | {verdict} |"


@dataclass(frozen=True)
class Benchmark:
    """One script with its goals."""

    title: str
    script: str
    goals: tuple[Goal, ...]

    @property
    def command(self) -> str:
        """Returns the command that repeats it, from the root of the project."""
        return f".venv-bench/bin/python benchmarks/{self.script} --json"


BENCHMARKS: dict[str, Benchmark] = {}


def run(name: str) -> None:
    """Runs one script and keeps its last line, with the date and how long it took."""
    benchmark = BENCHMARKS[name]
    print(f"== {name}: {benchmark.command}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / benchmark.script), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    answer = json.loads(lines[-1])
    answer["_date"] = datetime.date.today().isoformat()
    answer["_minutes"] = (time.monotonic() - started) / 60
    RAW.mkdir(parents=True, exist_ok=True)
    (RAW / f"{name}.json").write_text(json.dumps(answer, indent=1))


def section(name: str) -> str:
    """Returns the Markdown of one benchmark's last run."""
    benchmark, path = BENCHMARKS[name], RAW / f"{name}.json"
    answer = json.loads(path.read_text())
    lines = [
        f"## {benchmark.title}",
        "",
        f"`{benchmark.command}` ({answer.pop('_date')}, {answer.pop('_minutes'):.1f} minutes)",
        "",
        "| figure | goal | measured | met |",
        "|---|---|---|---|",
        *(goal.line(answer) for goal in benchmark.goals),
        "",
        "<details><summary>All figures</summary>",
        "",
        "```json",
        json.dumps(answer, indent=1),
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the named benchmarks, or all, and rewrites RESULTS.md."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    for name in names:
        run(name)
    known = [name for name in BENCHMARKS if (RAW / f"{name}.json").exists()]
    head = (
        "# Benchmarks\n\nWritten by `make bench`; every figure is a ratio of two sides that ran in "
        "the same invocation, or stands beside the raw figures it comes from.\n"
    )
    RESULTS.write_text("\n".join([head, *(section(name) for name in known)]))
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
