"""report: the run in one JSON file and table: stages, losses, test sets, where the time went."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

from pocl_dist.config import Config
from pocl_dist.display.output import make_console
from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json, read_json, read_json_lines
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


def _time_rows(run: RunDirectory) -> dict[str, JSONValue]:
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
    stages = _stage_rows(read_json_lines(run.metrics))
    found: dict[str, JSONValue] = {"stages": stages, "eval": cast("JSONValue", evals)}
    if harness := read_results(run):
        found["harness"] = harness
    return found


def report(config: Config, run: RunDirectory) -> None:
    """Writes `report.json` and prints it as tables."""
    if not run.metrics.exists():
        raise MissingInputError(f"{run.metrics} does not exist: run distill first")
    value = results(run) | {"time": _time_rows(run) if run.timings.exists() else {}}
    atomic_write_json(run.root / "report.json", value)
    _print(value)


def _print(value: dict[str, JSONValue]) -> None:
    from rich.table import Table

    console = make_console()
    stages = Table(
        "stage", "steps", "loss, first epoch", "loss, last epoch", "dev", title="Training"
    )
    for row in cast("list[dict[str, float]]", value["stages"]):
        dev = "" if row["dev"] is None else f"{row['dev']:.2f}"
        losses = (f"{row['first_epoch_loss']:.4f}", f"{row['last_epoch_loss']:.4f}")
        stages.add_row(str(row["stage"] + 1), str(row["num_steps"]), *losses, dev)
    console.print(stages)
    tests = Table("test set", "model", "ROUGE-L", "exact match", title="Test sets")
    for name, result in cast("dict[str, dict[str, object]]", value["eval"]).items():
        baselines = cast("dict[str, dict[str, float]]", result.get("baselines") or {})
        for model, scores in {**baselines, "student": cast("dict[str, float]", result)}.items():
            tests.add_row(
                name,
                model.replace("_", " "),
                f"{scores['rouge_l']:.2f}",
                f"{scores['exact_match']:.2f}",
            )
    if tests.row_count:
        console.print(tests)
    if value["time"]:
        time_used = cast("dict[str, float]", value["time"])
        seconds = cast("dict[str, float]", value["time"]["seconds"])  # type: ignore[index,call-overload]
        parts = ", ".join(f"{step} {spent:.0f} s" for step, spent in seconds.items())
        console.print(
            f"Time: {parts}. Measure and plan took "
            f"{100 * time_used['measure_and_plan_share']:.1f} % of "
            f"{time_used['total_seconds']:.0f} s."
        )
