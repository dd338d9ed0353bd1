"""The whole four-stage schedule, the teacher beside the student against the teacher from a cache.

    python benchmarks/bench_schedule.py [--data FILE] [--rows 40] [--visits 5] --json

SmolLM2-135M-Instruct and 8 of its 30 layers, `configs/smollm2_cpu.yaml` as it is shipped (two
ranks, ZeRO-3), rows in random order (the order costs nothing here). Each side is a `pocl-dist run`
in processes of its own, timed from its start to its end: imports, loading, export, and for the
cached side the time to build the cache. Converting the teacher and cutting the student come first
and warm the disk up; their time is in neither side. The first losses of both sides must agree.

The figure for 20 visits is projected: what a visit costs is measured between the first and the
last step of each side, the rest of its time is paid once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sides import machine

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2_cpu.yaml"
ROWS = ROOT.parent / "shared" / "data" / "instruct_train.jsonl"
BUNDLED_ROWS = ROOT / "pocl_dist" / "bundled" / "train.jsonl"
SIDES = {"online": "online", "cached": "cache_hidden"}
PROJECTED_VISITS = 20
COMPARED_STEPS, TOLERANCE = 5, 1e-5  # relative
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Schedule:
    """What one side took."""

    command: str
    seconds: float
    seconds_of_steps: dict[str, float]  # timings.json: plan, cache, distill, report
    num_visits: float
    seconds_per_visit: float  # of one row, between the first and the last step
    num_steps: int
    cache_bytes: int
    peak_memory_bytes: int  # resident, of the rank with most
    losses: list[float]

    def projected_seconds(self, num_rows: int, visits: int) -> float:
        """Returns the wall time at `visits` visits per row."""
        once = self.seconds - self.num_visits * self.seconds_per_visit
        return once + num_rows * visits * self.seconds_per_visit


def step_rows(path: Path) -> list[dict[str, float]]:
    """Returns the finished lines of steps so far."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def pocl_dist(command: str, words: list[str], log: Path, metrics: Path) -> list[float]:
    """Runs a command; returns when it was started, when each step came in, and when it ended."""
    full = [sys.executable, "-m", "pocl_dist", command, str(CONFIG), *words]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    times = [time.monotonic()]
    with log.open("w") as stream:
        process = subprocess.Popen(full, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            num_new = len(step_rows(metrics)) - len(times) + 1
            times += [time.monotonic()] * num_new
    times.append(time.monotonic())
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(full)} ended with {process.returncode}:\n{log.read_text()}")
    return times


def run_schedule(side: str, folder: Path, words: list[str]) -> Schedule:
    """Runs all steps of one side and reads what it took."""
    run = folder / side
    words = [f"run_dir={run}", f"teacher.source={SIDES[side]}", *words]
    times = pocl_dist("run", words, folder / f"{side}.log", run / "metrics.jsonl")
    rows = step_rows(run / "metrics.jsonl")
    plan = json.loads((run / "plan.json").read_text())
    num_visits = sum(stage["num_examples"] * stage["epochs"] for stage in plan["stages"])
    first_batch = num_visits / len(rows)  # a step's rows in the mean; the last of a stage has fewer
    cache = run / "teacher_cache"
    return Schedule(
        command=f"pocl-dist run configs/{CONFIG.name} " + " ".join(words),
        seconds=times[-1] - times[0],
        seconds_of_steps=json.loads((run / "timings.json").read_text()),
        num_visits=num_visits,
        seconds_per_visit=(times[-2] - times[1]) / (num_visits - first_batch),
        num_steps=len(rows),
        cache_bytes=sum(file.stat().st_size for file in cache.glob("*")) if cache.exists() else 0,
        peak_memory_bytes=int(max(row["peak_memory_bytes"] for row in rows)),
        losses=[row["loss"] for row in rows],
    )


def relative_differences(online: list[float], cached: list[float]) -> list[float]:
    """Returns the differences of all steps; raises SystemExit when the first do not agree.

    A cut model at 3e-4 doubles a difference in the last bit with every step, or does worse, so what
    comes later shows no error of the cache. Equal losses to 1e-6 are shown on the tiny pair
    (tests/test_cached_distill.py).
    """
    differences = [abs(a - b) / abs(a) for a, b in zip(online, cached, strict=True)]
    first = differences[:COMPARED_STEPS]
    if max(first) > TOLERANCE:
        raise SystemExit(f"the sides' losses differ: {', '.join(f'{x:.1e}' for x in first)}")
    return differences


def take_rows(given: Path | None, num_rows: int, folder: Path) -> Path:
    """Writes the first rows of the data; without a file, loudly, the bundled toy rows."""
    source = given or ROWS
    if given is None and not source.exists():
        print(f"WARNING: {source} is not there; the bundled toy rows are used", file=sys.stderr)
        source = BUNDLED_ROWS
    rows = source.read_text().splitlines()[:num_rows]
    if len(rows) < num_rows:
        raise SystemExit(f"{source} has {len(rows)} rows, --rows asks for {num_rows}")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help=f"rows (default: {ROWS.name} of the shared data)")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--visits", type=float, default=5.0, help="visits of a row in the mean")
    parser.add_argument("--json", action="store_true", help="the last line is JSON (it always is)")
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="for both sides")
    return parser.parse_args()


def main() -> None:
    """Makes the student, runs both sides, compares, prints."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-schedule-") as name:
        folder = Path(name)
        rows = take_rows(options.data, options.rows, folder)
        common = [
            f"data.train={rows}",
            "curriculum.ordering=shuffled",
            f"curriculum.visits_per_example={options.visits}",
            "log.trackers=[]",
            *options.words,
        ]
        made = folder / "student"
        pocl_dist("init-student", [f"run_dir={made}", *common], folder / "init.log", made / "none")
        given = ["models.student.init_layers=", f"models.student.path={made / 'init_student'}"]
        sides = {side: run_schedule(side, folder, [*given, *common]) for side in SIDES}
    online, cached = sides["online"], sides["cached"]
    differences = relative_differences(online.losses, cached.losses)
    projected = {
        side: run.projected_seconds(options.rows, PROJECTED_VISITS) for side, run in sides.items()
    }
    result = {
        "benchmark": "schedule",
        "rows": options.rows,
        "visits_per_example": options.visits,
        "machine": machine(),
        "sides": {side: asdict(run) for side, run in sides.items()},
        "relative_loss_differences": differences,
        f"projected_seconds_at_{PROJECTED_VISITS}_visits": projected,
        "ratios": {
            "online_vs_cached": online.seconds / cached.seconds,
            f"online_vs_cached_projected_{PROJECTED_VISITS}_visits": projected["online"]
            / projected["cached"],
            "online_vs_cached_per_visit": online.seconds_per_visit / cached.seconds_per_visit,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
