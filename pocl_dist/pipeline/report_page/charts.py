"""Vega-Lite specifications of the charts of difficulty, quarters, time and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.pipeline.report_page.chart_parts import (
    BEFORE_COLOUR,
    Spec,
    number,
    stage_bands,
    stage_colours,
    stage_scale,
    y_axis,
)
from pocl_dist.pipeline.report_page.series import BEFORE

# Names are longer than the numbers for which the page keeps room.
_NAMES = {"ticks": False, "domain": False, "minExtent": 0, "maxExtent": 400, "labelLimit": 190}


def scatter(num_stages: int) -> Spec:
    """Returns ROUGE-L against cross-entropy of the student before training, coloured by stage."""
    return {
        "height": 300,
        "data": {"name": "ranking"},
        "mark": {"type": "circle", "size": 16, "opacity": 0.6},
        "encoding": {
            "x": {
                "field": "cross_entropy",
                "type": "quantitative",
                "title": "cross-entropy of the reference, nats (hard →)",
                "scale": {"zero": False},
            },
            "y": {
                "field": "rouge_l",
                "type": "quantitative",
                "title": "ROUGE-L of its answer (easy ↑)",
                "axis": {"format": ".0%"},
            },
            "fill": {
                "field": "stage",
                "type": "ordinal",
                "scale": stage_scale(num_stages),
                "legend": {"title": "first trained in stage", "orient": "top", "symbolOpacity": 1,
                           "columns": 8,
                           "labelExpr": "datum.value + 1"},
            },
            "tooltip": [
                {"field": "example_id", "type": "nominal", "title": "row"},
                number("place", "place", ","),
                number("rouge_l", "ROUGE-L", ".1%"),
                number("cross_entropy", "cross-entropy"),
                number("fused_score", "fused score", ".4~g"),
            ],
        },
    }  # fmt: skip


def fused_curve(num_stages: int, num_rows: int) -> Spec:
    """Returns the fused score over the places of the ranking, easy to hard."""
    x: Spec = {
        "field": "place",
        "type": "quantitative",
        "title": "place in the ranking, easy → hard",
        "scale": {"domain": [1, max(2, num_rows)], "nice": False},
        "axis": {"tickCount": 4, "grid": False, "format": ",d" if num_rows < 20_000 else "~s"},
    }
    line: Spec = {
        "data": {"name": "ranking"},
        "mark": {"type": "line", "strokeWidth": 1.6},
        "encoding": {
            "x": x,
            "y": y_axis("fused_score", form=".2~g"),
            "tooltip": [
                number("place", "place", ","),
                number("fused_score", "fused score", ".4~g"),
            ],
        },
    }
    return {"height": 300, "layer": [stage_bands(num_stages, "rank_bands"), line]}


def quarter_bars(name: str, whens: Sequence[str], num_stages: int) -> Spec:
    """Returns bars of a score per quarter: before training and after each stage."""
    colours = [BEFORE_COLOUR, *stage_colours(num_stages)]
    places = [0 if when == BEFORE else int(when.rpartition(" ")[2]) for when in whens]
    return {
        "height": 180,
        "data": {"name": "quarters"},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "quarter", "type": "nominal", "title": None,
                  "axis": {"labelAngle": 0, "ticks": False}, "scale": {"paddingInner": 0.25}},
            "xOffset": {"field": "order", "type": "ordinal"},
            "y": y_axis(name),
            "fill": {
                "field": "when",
                "type": "nominal",
                "scale": {"domain": list(whens), "range": [colours[place] for place in places]},
                "legend": {"title": "at the end of stage", "orient": "top", "columns": 6,
                           "labelExpr": "replace(datum.label, 'stage ', '')"},
            },
            "tooltip": [
                {"field": "quarter", "type": "nominal", "title": "quarter"},
                {"field": "when", "type": "nominal", "title": "when"},
                number(name, name.replace("_", " ")),
                number("num_rows", "rows", ","),
            ],
        },
    }  # fmt: skip


def time_bars(num_bars: int) -> Spec:
    """Returns the seconds of each step of the run."""
    return {
        "height": 26 * num_bars,
        "data": {"name": "times"},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None,
                  "axis": _NAMES},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds",
                  "axis": {"tickCount": 4, "format": "~s"}},
            "tooltip": [number("seconds", "seconds")],
        },
    }  # fmt: skip


def intervals(data: str, title: str, num_rows: int) -> Spec:
    """Returns differences with their intervals, a row each (`name`, `value`, `low`, `high`).

    An interval that holds 0 is pale.
    """
    y: Spec = {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": _NAMES}
    tooltip = [
        {"field": "name", "type": "nominal", "title": "method"},
        *(number(name, name, "+.2f") for name in ("value", "low", "high")),
    ]
    shared: Spec = {"data": {"name": data}}
    test = "datum.low > 0 || datum.high < 0"
    is_clear: Spec = {"condition": {"test": test, "value": 1}, "value": 0.45}
    return {
        "height": 28 * num_rows,
        "layer": [
            {
                "data": {"values": [{"at": 0}]},
                "mark": {"type": "rule", "strokeWidth": 1, "strokeDash": [3, 3], "tooltip": None},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            },
            {
                **shared,
                "mark": {"type": "rule", "strokeWidth": 2.5},
                "encoding": {
                    "y": y,
                    "x": {"field": "low", "type": "quantitative", "title": title},
                    "x2": {"field": "high"},
                    "opacity": is_clear,
                    "tooltip": tooltip,
                },
            },
            {
                **shared,
                "mark": {"type": "circle", "size": 70},
                "encoding": {
                    "y": y,
                    "x": {"field": "value", "type": "quantitative"},
                    "opacity": is_clear,
                    "tooltip": tooltip,
                },
            },
        ],
    }
