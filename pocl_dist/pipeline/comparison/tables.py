"""comparison.md, comparison.html and the printed table, from comparison.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from pocl_dist.display.output import make_console
from pocl_dist.pipeline.comparison.scores import columns_of
from pocl_dist.pipeline.report_page.comparison_page import comparison_page
from pocl_dist.pipeline.report_page.page import chart_library, render

if TYPE_CHECKING:
    from pocl_dist.files import JSONValue

Row = Mapping[str, "JSONValue"]
_METRIC_TITLES = {"rouge_l": "ROUGE-L", "exact_match": "Exact match"}
_KIND_TITLES = {"sft": "SFT", "seqkd": "SeqKD", "kd": "KD", "pocl": "KD + POCL"}
_BASELINE_TITLES = {"teacher": "teacher", "student_before": "student before training"}
NOTHING = "–"


def _columns(value: Row) -> list[str]:
    """Returns the columns of figures."""
    return list(columns_of(list(cast("Row", value["test_sets"]))))


def _rows(value: Row, key: str) -> list[Row]:
    return cast("list[Row]", value[key])


def _spread(found: Row | None, num_seeds: int) -> str:
    """Returns mean ± standard deviation; a star when seeds are missing."""
    if found is None:
        return NOTHING
    std = "" if found["std"] is None else f" ± {found['std']:.2f}"
    star = "" if found["num_seeds"] == num_seeds else " *"
    return f"{found['mean']:.2f}{std}{star}"


def _difference(found: Row | None) -> str:
    if found is None or found["mean"] is None:
        return NOTHING
    star = "" if found["is_complete"] else " *"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]{star}"


def _figure(results: Row, column: str, metric: str) -> Row | None:
    of_column = cast("Row | None", results.get(column))
    return None if of_column is None else cast("Row", of_column[metric])


def _find_difference(value: Row, arm: str, against: str, column: str, metric: str) -> Row | None:
    wanted = {"arm": arm, "against": against, "test_set": column, "metric": metric}
    found = (row for row in _rows(value, "differences") if wanted.items() <= row.items())
    return next(found, None)


def _rate(arm: Row) -> str:
    chosen = cast("Row", arm["learning_rate"])["chosen"]
    return NOTHING if chosen is None else f"{chosen:g}"


def _num_seeds(value: Row) -> int:
    return len(cast("list[int]", cast("Row", value["request"])["seeds"]))


def main_table(value: Row, metric: str) -> list[list[str]]:
    """Returns header and lines: baselines, SFT, SeqKD; per method KD, KD + POCL, difference."""
    columns = _columns(value)
    lines = [["method", "arm", "visits", "learning rate", *columns]]
    for model, results in cast("Mapping[str, Row]", value["baselines"]).items():
        cells = [_spread(_figure(results, column, metric), 1) for column in columns]
        lines.append([_BASELINE_TITLES[model], "", "", "", *cells])
    for arm in _rows(value, "arms"):
        if arm["kind"] == "ablation":
            continue
        results = cast("Row", arm["results"])
        cells = [_spread(_figure(results, c, metric), _num_seeds(value)) for c in columns]
        title = _KIND_TITLES[str(arm["kind"])]
        names = [title, ""] if arm["method"] is None else [str(arm["method"]), title]
        lines.append([*names, str(arm["visits"]), _rate(arm), *cells])
        if arm["kind"] == "pocl":
            against = f"{arm['method']}-kd"
            found = [_find_difference(value, str(arm["name"]), against, c, metric) for c in columns]
            lines.append(["", "difference", "", "", *map(_difference, found)])
    return lines


def ablation_table(value: Row, metric: str) -> list[list[str]]:
    """Returns header and lines: each control, what it gains over plain KD, what POCL gains on it.

    The last column of figures is used: the average, or the only test set.
    """
    column = _columns(value)[-1]
    arm_of_name = {str(arm["name"]): arm for arm in _rows(value, "arms")}
    lines = [
        ["method", "ablation", "variant", "visits", "learning rate", column, "minus KD",
         "POCL minus it"]
    ]  # fmt: skip
    for row in _rows(value, "ablations"):
        arm, method, name = arm_of_name[str(row["arm"])], row["method"], str(row["arm"])
        results = cast("Row", arm["results"])
        gains = [
            _find_difference(value, name, f"{method}-kd", column, metric),
            _find_difference(value, f"{method}-pocl", name, column, metric),
        ]
        lines.append(
            [
                str(method),
                str(row["ablation"]),
                f"{row['variant']} (= {name})"
                if arm["kind"] != "ablation"
                else str(row["variant"]),
                str(arm["visits"]),
                _rate(arm),
                _spread(_figure(results, column, metric), _num_seeds(value)),
                *map(_difference, gains),
            ]
        )
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *body = lines
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def _intro(value: Row) -> Iterator[str]:
    request, bootstrap = cast("Row", value["request"]), cast("Row", value["bootstrap"])
    seeds = ", ".join(map(str, cast("list[int]", request["seeds"])))
    grid = cast("list[float]", value["grid"])
    yield (
        f"Seeds {seeds}; every arm makes {value['target_visits']} sample visits (within 1 %). "
        "Figures are percentages, mean ± standard deviation over seeds; a difference is KD + POCL "
        f"minus KD, with the {bootstrap['confidence']:.0%} interval of a bootstrap over test "
        "examples."
    )
    if len(grid) > 1:
        metric = cast("Row", value["dev"])["metric"]
        rates = ", ".join(f"{rate:g}" for rate in grid)
        first = cast("list[int]", request["seeds"])[0]
        yield f"Each arm chose its learning rate from {rates} by dev {metric} with seed {first}."
    else:
        yield f"All arms have the learning rate {grid[0]:g}: none had a choice."


def titled_tables(value: Row) -> dict[str, list[list[str]]]:
    """Returns {title: header and lines} of all tables."""
    tables = {title: main_table(value, metric) for metric, title in _METRIC_TITLES.items()}
    if value["ablations"]:
        tables["Ablations, ROUGE-L"] = ablation_table(value, "rouge_l")
    return tables


def html(name: str, value: Row) -> str:
    """Returns comparison.html: the tables, and each difference with its interval as a chart."""
    page = comparison_page(name, value, titled_tables(value), list(_intro(value)))
    return render(page, chart_library())


def markdown(value: Row) -> str:
    """Returns comparison.md."""
    lines = ["# Plain distillation and the POCL curriculum", "", *_intro(value)]
    for title, table in titled_tables(value).items():
        lines += ["", f"## {title}", "", *_markdown(table)]
    marks = cast("list[str]", value["marks"])
    if marks:
        lines += ["", "## Missing", ""]
        lines += ["`*` fewer seeds than asked for; `–` no finished run.", ""]
        lines += [f"- {mark}" for mark in marks]
    return "\n".join(lines) + "\n"


def print_tables(value: Row) -> None:
    """Prints the ROUGE-L tables and what is missing."""
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    tables = [("ROUGE-L, %", main_table(value, "rouge_l"))]
    if value["ablations"]:
        tables.append(("Ablations, ROUGE-L, %", ablation_table(value, "rouge_l")))
    for title, (header, *body) in tables:
        table = Table(*header, title=title)
        for line in body:
            table.add_row(*map(Text, line))
        console.print(table)
    for mark in cast("list[str]", value["marks"]):
        console.print(Text(f"missing: {mark}"))
