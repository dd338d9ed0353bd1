"""report: the run in one JSON file, one HTML page, and tables. Loads no torch.

A run that is not whole is reported as far as it goes: what is missing, unfinished or made from
something else is marked in both files (report_page/findings.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pocl_dist.config import Config
from pocl_dist.display.output import make_console, say, warn
from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json, atomic_write_text
from pocl_dist.pipeline.report_numbers import results, time_rows
from pocl_dist.pipeline.report_page.gather import gather
from pocl_dist.pipeline.report_page.page import chart_library, render
from pocl_dist.pipeline.report_page.run_page import run_page
from pocl_dist.pipeline.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.table import Table


def report(config: Config, run: RunDirectory) -> None:
    """Writes `report.json` and `report.html` and prints the tables.

    Raises MissingInputError (66) where no step has left anything yet.
    """
    if not (run.metrics.exists() or run.plan.exists() or run.difficulty.exists()):
        raise MissingInputError(
            f"{run.root} holds neither difficulty/ nor plan.json nor metrics.jsonl: "
            "there is nothing to report; run `pocl-dist run` first"
        )
    numbers = results(run) | {"time": time_rows(run)}
    found = gather(config, run, numbers)
    numbers["findings"] = [finding.to_json() for finding in found.findings]
    atomic_write_json(run.root / "report.json", numbers)
    page = run.root / "report.html"
    atomic_write_text(page, render(run_page(found), chart_library()))
    _print(numbers)
    for finding in found.findings:
        if finding.kind != "missing":
            warn(f"report: {finding.kind}: {finding.text} ({finding.remedy})")
    say(f"report: {page}")


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
    if stages.row_count:
        console.print(stages)
    quarters = _quarter_table(cast("list[dict[str, JSONValue]]", value["quarters"]))
    if quarters.row_count:
        console.print(quarters)
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


def _quarter_table(rows: list[dict[str, JSONValue]]) -> Table:
    """Returns ROUGE-L of each quarter, easy to hard, before training and at the stage ends."""
    from rich.table import Table

    table = Table("step", "Q1 easy", "Q2", "Q3", "Q4 hard", title="ROUGE-L by difficulty quarter")
    for row in rows:
        values = cast("list[float | None]", row["rouge_l"])
        table.add_row(str(row["step"]), *("" if v is None else f"{v:.2f}" for v in values))
    return table
