"""Runs every benchmark, one after the other, and writes RESULTS.md from their JSON.

Usage: python benchmarks/run_all.py [NAME ...]

Names are those of BENCHMARKS, without any all that are not long. A named run replaces those
sections only; the others stay as they stand in RESULTS.md, with their date. Raw JSON of the last
runs on this machine lies in `runs/benchmarks/`.
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
    note: str = ""  # why a goal is out of reach, where it is
    is_long: bool = False  # runs only when it is named

    @property
    def command(self) -> str:
        """Returns the command that repeats it, from the root of the project."""
        return f".venv-bench/bin/python benchmarks/{self.script} --json"


def _loss_goals() -> tuple[Goal, ...]:
    shapes = ("1024 x 49152 x 576", "4096 x 49152 x 576", "1024 x 151936 x 1536")
    return tuple(
        goal
        for index, shape in enumerate(shapes)
        for goal in (
            Goal(f"{shape}: time / fastest peer", _loss(index, "time_vs_fastest_peer"), "<=", 0.6),
            Goal(f"{shape}: time / matrix products", _loss(index, "time_vs_matmul"), "<=", 1.5),
            Goal(
                f"{shape}: memory / smallest peer",
                _loss(index, "memory_vs_smallest_peer"),
                "<=",
                0.35,
            ),
        )
    )


def _loss(index: int, ratio: str) -> str:
    return f"shapes.{index}.ratios.{ratio}"


BENCHMARKS = {
    "losses": Benchmark(
        "Fused loss: one forward and backward, JSD (N x V x H)",
        "bench_losses.py",
        _loss_goals(),
        note="Time against the fastest peer has a floor: exact gradients need the four matrix "
        "products, and Liger is within about 1.4 times of them, so that 0.6 of Liger would be "
        "less than the products alone. Memory at V = 151936: the head's gradient, which is a "
        "result, takes 890 MiB in fp32; 0.35 of the smallest peer (2432 MiB) would be 851 MiB.",
    ),
    "step": Benchmark(
        "Train step against TRL's GKDTrainer",
        "bench_step.py",
        (
            Goal("tokens/s, online / TRL", "ratios.online_speed_vs_trl", ">=", 2.5),
            Goal("tokens/s, cached / TRL", "ratios.cached_speed_vs_trl", ">=", 4.5),
            Goal("peak memory, online / TRL", "ratios.online_memory_vs_trl", "<=", 0.35),
            Goal("peak memory, cached / TRL", "ratios.cached_memory_vs_trl", "<=", 0.35),
        ),
    ),
    "schedule": Benchmark(
        "Four-stage schedule, online against cached",
        "bench_schedule.py",
        (
            Goal("wall time, 5 visits, cache included", "ratios.online_vs_cached", ">=", 2.0),
            Goal(
                "the same at 20 visits, projected",
                "ratios.online_vs_cached_projected_20_visits",
                ">=",
                2.0,
            ),
        ),
        note="The most that a cache can save here: per token the teacher's 30 layers take "
        "2 x 106.2M operations, forward and backward of the student's 8 layers 6 x 28.3M, and "
        "both heads, on the 30 % response tokens, 0.3 x 8 x 28.3M, with and without a cache: 450M "
        "against 238M, "
        "1.9 times. A teacher that is larger beside its student gives more.",
    ),
    "measure": Benchmark(
        "Difficulty pass against the straightforward loop",
        "bench_measure.py",
        (
            Goal("times faster, Ray's start included", "ratios.times_faster", ">=", 3.0),
            Goal("without Ray's start", "ratios.times_faster_without_start", ">=", 3.0),
        ),
        note="The straightforward loop's time is without its imports and loading. Ours with start "
        "holds Ray's (5 s), the actors' imports of torch and transformers (6 s) and the loading: "
        "paid once, whatever the number of rows.",
    ),
    "memory": Benchmark(
        "Bytes per rank under ZeRO 0 to 3 against the formula",
        "bench_memory.py",
        (
            Goal(
                "largest difference from the formula",
                "ratios.largest_difference_from_formula",
                "<=",
                0.1,
            ),
        ),
    ),
    "scale": Benchmark(
        "Rows: read, planned and fed to a rank, ten thousand to ten million",
        "bench_scale.py",
        (
            Goal("10M rows read and planned, seconds", "largest.read_and_plan_seconds", "<=", 600),
            Goal("most memory of reading and planning, GiB", "largest.largest_gib", "<=", 2.0),
            Goal("a rank's memory, 10M rows minus 10k, MiB", "rank_growth_mib", "<=", 160),
        ),
        note="A rank's memory grows by 8 bytes per row (its place in the ranking and in the epoch: "
        "76 MiB at ten million) and by the tokens that it keeps, 64 MiB at most.",
        is_long=True,
    ),
}


def run(name: str) -> str:
    """Runs one script and keeps its last line, with the date and how long it took.

    Returns why there is none, or nothing: the others' hour is not to be lost.
    """
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
        return f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}"
    answer = json.loads(lines[-1])
    answer["_date"] = datetime.date.today().isoformat()
    answer["_minutes"] = (time.monotonic() - started) / 60
    RAW.mkdir(parents=True, exist_ok=True)
    (RAW / f"{name}.json").write_text(json.dumps(answer, indent=1))
    return ""


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
        *([benchmark.note, ""] if benchmark.note else []),
        *([str(answer.pop("markdown")), ""] if "markdown" in answer else []),
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


def kept_sections() -> dict[str, str]:
    """Returns {name: section} of RESULTS.md as it stands."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    by_title = {part.partition("\n")[0]: f"## {part}" for part in text.split("\n## ")[1:]}
    return {
        name: by_title[benchmark.title]
        for name, benchmark in BENCHMARKS.items()
        if benchmark.title in by_title
    }


def main() -> None:
    """Runs the named benchmarks, or all, and rewrites RESULTS.md."""
    names = sys.argv[1:] or [name for name, one in BENCHMARKS.items() if not one.is_long]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    sections, failures = kept_sections(), []
    for name in names:
        failure = run(name)
        if failure:
            failures.append(failure)
        else:
            sections[name] = section(name)
    head = (
        "# Benchmarks\n\nWritten by `make bench`; every figure is a ratio of two sides that ran in "
        "the same invocation, or stands beside the raw figures it comes from.\n"
    )
    RESULTS.write_text(
        "\n".join(
            [head, *(sections[name].strip() + "\n" for name in BENCHMARKS if name in sections)]
        )
    )
    print(f"wrote {RESULTS}")
    if failures:
        sys.exit("\n".join(["FAILED; these sections are as they were:", *failures]))


if __name__ == "__main__":
    main()
