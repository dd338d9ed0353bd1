"""Prints the table that ends `make quickstart`: teacher, student before, KD, KD + POCL."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

TEST_SET = "test"


def visits(run: Path) -> int:
    """Returns the sample visits of a run, from its plan."""
    stages = json.loads((run / "plan.json").read_text())["stages"]
    return round(sum(stage["num_examples"] * stage["epochs"] for stage in stages))


def scores(run: Path) -> dict[str, dict[str, float]]:
    """Returns {model: {rouge_l, exact_match}} of a run on the test split."""
    report = json.loads((run / "eval" / TEST_SET / "report.json").read_text())
    return {**(report.get("baselines") or {}), "student": report}


def main(folder: Path) -> None:
    """Reads `folder`/kd and `folder`/pocl and prints the table."""
    kd, pocl = folder / "kd", folder / "pocl"
    plain, curriculum = scores(kd), scores(pocl)
    table = Table(title="ROUGE-L and exact match on the 200 test rows, greedy answers, %")
    for column in ("model", "ROUGE-L", "exact match", "sample visits"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = (
        ("teacher", plain["teacher"], ""),
        ("student before", plain["student_before"], ""),
        ("KD student", plain["student"], f"{visits(kd)}"),
        ("KD + POCL student", curriculum["student"], f"{visits(pocl)}"),
    )
    for name, score, visited in rows:
        table.add_row(name, f"{score['rouge_l']:.2f}", f"{score['exact_match']:.2f}", visited)
    console = Console()
    console.print(table)
    for run in (kd, pocl):
        time_used = json.loads((run / "report.json").read_text())["time"]
        share = 100 * time_used["measure_and_plan_share"]
        console.print(
            f"{run}: {time_used['total_seconds']:.0f} s, of which measure and plan {share:.1f} %"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
