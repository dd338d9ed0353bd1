"""The page of a comparison: its tables, and each difference with its interval. From values alone.

Whoever has a `comparison.json` and its tables makes the page with

    render(comparison_page(name, value, tables, intro), chart_library())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from pocl_dist.files import JSONValue
from pocl_dist.pipeline.report_page.chart_parts import Spec
from pocl_dist.pipeline.report_page.charts import intervals
from pocl_dist.pipeline.report_page.facts import METRICS
from pocl_dist.pipeline.report_page.page import Page
from pocl_dist.pipeline.report_page.series import Columns, Row

Table = Sequence[Sequence[str]]
"""Lines of cells, the header first."""


def comparison_page(
    name: str, value: Row, tables: Mapping[str, Table], intro: Sequence[str]
) -> Page:
    """Returns the page; `value` is what `comparison.json` holds, `tables` has {title: lines}.

    A chart per metric shows the differences in the average over the test sets, or in the only one.
    """
    specs: dict[str, Spec] = {}
    datasets: dict[str, Columns] = {}
    titles = {}
    for metric, title in METRICS.items():
        rows = _differences(value, metric)
        if rows:
            key = f"differences_{metric}"
            titles[key] = f"{title}: differences, in points"
            specs[key] = intervals(key, "difference, points", len(rows))
            datasets[key] = {
                column: [row[column] for row in rows] for column in ("name", "value", "low", "high")
            }
    values: dict[str, object] = {
        "title": f"{name} · pocl_dist comparison",
        "name": name,
        "intro": list(intro),
        "tables": [
            {"title": title, "header": lines[0], "lines": lines[1:]}
            for title, lines in tables.items()
        ],
        "differences": titles,
        "confidence": f"{float(cast('float', _section(value, 'bootstrap')['confidence'])):.0%}",
        "marks": list(cast("Sequence[str]", value["marks"])),
        "versions": {key: str(found) for key, found in _section(value, "versions").items()},
    }
    return Page("comparison.html", values, specs, datasets)


def _section(value: Row, name: str) -> Mapping[str, JSONValue]:
    return cast("Mapping[str, JSONValue]", value[name])


def _differences(value: Row, metric: str) -> list[dict[str, JSONValue]]:
    """Returns the rows of a chart; a difference without a common seed has no interval."""
    sets = list(_section(value, "test_sets"))
    column = sets[0] if len(sets) == 1 else "average"
    found = cast("Sequence[Row]", value["differences"])
    return [
        {
            "name": f"{row['arm']} − {row['against']}",
            "value": row["mean"],
            "low": row["low"],
            "high": row["high"],
        }
        for row in found
        if row["metric"] == metric and row["test_set"] == column and row["mean"] is not None
    ]
