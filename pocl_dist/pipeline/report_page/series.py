"""`metrics.jsonl` as the data of the charts over training; every number is one of the file's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pocl_dist.files import JSONValue
from pocl_dist.pipeline.report_page.thinning import numbers, running_mean, thinned

Row = Mapping[str, JSONValue]
Columns = dict[str, list[JSONValue]]

MAX_POINTS = 2000
"""Steps that are drawn; of more, ends and extremes stay (thinning.py)."""
BEFORE = "before"
"""Name of the evaluation before training, where the others have that of the stage they end."""
_LOSSES = ("loss", "kd_loss", "ce_loss", "kl")
_OTHERS = (
    "temperature",
    "kd_ratio",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "padding_share",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class Series:
    """The data sets of the charts over training, by columns, and how they were thinned."""

    steps: Columns  # of some steps; `mean_` columns are over all of them
    bands: Columns  # per stage: first and last step
    dev: Columns
    quarters: Columns  # a row per evaluation and quarter
    num_steps: int
    mean_steps: int  # over how many steps the `mean_` columns go

    @property
    def num_drawn(self) -> int:
        """Returns how many steps are drawn."""
        return len(self.steps["step"])


def make_series(metrics: Sequence[Row], quarters: Sequence[Row]) -> Series:
    """Returns the data sets; of a step that was taken again after a rewind the last line counts."""
    by_step = {row["step"]: row for row in metrics if row["kind"] == "step"}
    steps = [by_step[step] for step in sorted(by_step, key=_number)]
    half_width = len(steps) // 200
    dev_rows = [row for row in metrics if row["kind"] == "dev"]
    places = thinned(steps, "loss", [*_LOSSES[1:], *_OTHERS], "stage", MAX_POINTS)
    columns: Columns = {
        name: [steps[place].get(name) for place in places]
        for name in ("step", "stage", "epoch", *_LOSSES, *_OTHERS)
    }
    for name in _LOSSES:
        means = _stagewise_means(steps, name, half_width)
        columns[f"mean_{name}"] = [means[place] for place in places]
    return Series(
        steps=columns,
        bands=_bands(steps),
        dev={name: [row.get(name) for row in dev_rows] for name in ("step", "stage", "value")},
        quarters=_quarters(quarters),
        num_steps=len(steps),
        mean_steps=2 * half_width + 1,
    )


def _number(value: JSONValue) -> float:
    return float(cast("float", value))


def _stagewise_means(steps: Sequence[Row], name: str, half_width: int) -> list[float | None]:
    """Returns running means that do not reach over a stage change, where loss scales change."""
    rows_of: dict[JSONValue, list[Row]] = defaultdict(list)
    for row in steps:
        rows_of[row["stage"]].append(row)
    means: list[float | None] = []
    for rows in rows_of.values():
        means += running_mean(numbers(rows, name), half_width)
    return means


def _bands(steps: Sequence[Row]) -> Columns:
    """Returns per stage where it lies on the axis of steps, and what it trained with."""
    rows_of: dict[JSONValue, list[Row]] = defaultdict(list)
    for row in steps:
        rows_of[row["stage"]].append(row)
    stages = list(rows_of)
    starts = [_number(rows_of[stage][0]["step"]) - 1 for stage in stages]
    ends = [_number(rows_of[stage][-1]["step"]) for stage in stages]
    spans = zip(stages, starts, ends, strict=True)
    return {
        "stage": list(stages),
        "start": list(starts),
        "end": list(ends),
        "label": [_label(stage, (end - start) / max(ends)) for stage, start, end in spans],
    }


def _label(stage: JSONValue, share: float) -> str:
    """Returns what finds room above a band that takes this share of the axis, on a phone too."""
    name = stage_name(_number(stage))
    return name if share > 0.16 else name.rpartition(" ")[2] if share > 0.03 else ""


def stage_name(stage: float) -> str:
    """Returns how a stage is called where people read; they count from 1."""
    return f"stage {int(stage) + 1}"


def _quarters(rows: Sequence[Row]) -> Columns:
    """Returns a row per evaluation and quarter: quarters count from 1, easy to hard."""
    table: list[dict[str, JSONValue]] = []
    for order, row in enumerate(rows):
        stage = -1 if row["step"] == 0 else int(_number(row["stage"]))
        when = BEFORE if stage < 0 else stage_name(stage)
        of_quarter = {
            name: cast("list[JSONValue]", row[name])
            for name in ("num_rows", "rouge_l", "cross_entropy", "kl")
        }
        for index in range(len(of_quarter["num_rows"])):
            values = {name: column[index] for name, column in of_quarter.items()}
            place: dict[str, JSONValue] = {
                "quarter": f"Q{index + 1}", "when": when, "order": order, "stage": stage,
            }  # fmt: skip
            table.append(place | values)
    names = ("quarter", "when", "order", "stage", "num_rows", "rouge_l", "cross_entropy", "kl")
    return {name: [row[name] for row in table] for name in names}
