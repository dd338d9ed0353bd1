"""What the report says of training and test sets: a function of their files. Loads no torch."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

from pocl_dist.files import JSONValue, read_json, read_json_lines
from pocl_dist.pipeline.harness import read_results
from pocl_dist.pipeline.run_directory import RunDirectory

# The curriculum's own cost; everything else would be there without it.
OVERHEAD_STEPS = ("measure", "plan")


def _stage_rows(metrics: list[dict[str, JSONValue]]) -> list[JSONValue]:
    """Returns per stage the mean loss of first and last epoch, its steps and last dev metric."""
    losses: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    dev: dict[int, float] = {}
    for row in metrics:
        stage = int(cast("int", row["stage"]))
        if row["kind"] == "step":
            losses[stage][int(cast("int", row["epoch"]))].append(float(cast("float", row["loss"])))
        elif row["kind"] == "dev":
            dev[stage] = float(cast("float", row["value"]))
    rows: list[JSONValue] = []
    for stage, by_epoch in sorted(losses.items()):
        first, last = by_epoch[min(by_epoch)], by_epoch[max(by_epoch)]
        rows.append(
            {
                "stage": stage,
                "num_steps": sum(map(len, by_epoch.values())),
                "first_epoch_loss": sum(first) / len(first),
                "last_epoch_loss": sum(last) / len(last),
                "dev": dev.get(stage),
            }
        )
    return rows


def quarter_rows(metrics: list[dict[str, JSONValue]]) -> list[dict[str, JSONValue]]:
    """Returns the scores by difficulty quarter in their order; the last line of a step counts."""
    by_step: dict[int, dict[str, JSONValue]] = {}
    for row in metrics:
        if row["kind"] == "quarters":
            kept = {key: value for key, value in row.items() if key not in ("kind", "seconds")}
            by_step[int(cast("int", row["step"]))] = kept
    return [by_step[step] for step in sorted(by_step)]


def time_rows(run: RunDirectory) -> dict[str, JSONValue]:
    """Returns the seconds of each step, and the share of the curriculum's own; {} before any."""
    if not run.timings.exists():
        return {}
    timings = {name: float(cast("float", value)) for name, value in read_json(run.timings).items()}
    total = sum(timings.values())
    overhead = sum(timings.get(step, 0.0) for step in OVERHEAD_STEPS)
    return {
        "seconds": cast("JSONValue", timings),
        "total_seconds": total,
        "measure_and_plan_share": overhead / total if total else 0.0,
    }


def results(run: RunDirectory) -> dict[str, JSONValue]:
    """Returns what the report says of training and test sets: a function of their files."""
    evals = {path.parent.name: read_json(path) for path in sorted(run.eval.glob("*/report.json"))}
    metrics = read_json_lines(run.metrics)
    found: dict[str, JSONValue] = {
        "stages": _stage_rows(metrics),
        "quarters": cast("JSONValue", quarter_rows(metrics)),
        "eval": cast("JSONValue", evals),
    }
    if harness := read_results(run):
        found["harness"] = harness
    return found
