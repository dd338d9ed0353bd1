"""Vega-Lite specifications of the charts, over data sets by name; the browser draws them.

Colour means one thing on the whole page: the stage. Widths, and the colours of text and lines,
come from the page (page.js), which knows the screen and whether it is dark.
"""

from __future__ import annotations

from collections.abc import Sequence

Spec = dict[str, object]

# Okabe and Ito (2008), told apart by all kinds of colour vision; cool to warm is easy to hard.
_STAGE_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_OF_COUNT = {1: (4,), 2: (1, 4), 3: (1, 3, 4), 4: (1, 2, 3, 4), 5: (0, 1, 2, 3, 4)}
BEFORE_COLOUR = "#8C8C8C"
# Not the colours of stages: violet and brown, and the colour of the text for the sum.
_PART_COLOURS = {"loss": "text", "KD": "#8E6BBF", "CE": "#A07B44", "KL at T = 1": "#8C8C8C"}
_DASHES = {"loss": [1, 0], "KD": [1, 0], "CE": [1, 0], "KL at T = 1": [3, 3]}


def stage_colours(num_stages: int) -> list[str]:
    """Returns a colour per stage; beyond six stages, shades between the six."""
    if num_stages in _OF_COUNT:
        return [_STAGE_COLOURS[place] for place in _OF_COUNT[num_stages]]
    last = len(_STAGE_COLOURS) - 1
    return [_between(last * index / (num_stages - 1)) for index in range(num_stages)]


def _between(place: float) -> str:
    """Returns the colour at a place between two of the list."""
    low = min(int(place), len(_STAGE_COLOURS) - 2)
    pairs = [
        [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        for colour in _STAGE_COLOURS[low : low + 2]
    ]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*pairs, strict=True)]
    return "#" + "".join(f"{value:02X}" for value in mixed)


def _stage_scale(num_stages: int) -> Spec:
    return {"domain": list(range(num_stages)), "range": stage_colours(num_stages)}


def _number(name: str, title: str, form: str = ",.4~r") -> Spec:
    """Returns a line of a tooltip."""
    return {"field": name, "type": "quantitative", "title": title, "format": form}


def _y(name: str, *, from_zero: bool = True, form: str = "~s") -> Spec:
    return {
        "field": name,
        "type": "quantitative",
        "title": None,
        "scale": {"zero": from_zero, "nice": 3},
        "axis": {"tickCount": 3, "format": form},
    }


# ------------------------------------------------------------------------------------- over training

_STEP_TOOLTIP = [
    _number("step", "step", ","),
    {"field": "stage_name", "type": "nominal", "title": "stage"},
    _number("loss", "loss"),
    _number("kd_loss", "KD"),
    _number("ce_loss", "CE"),
    _number("kl", "KL at T = 1"),
    _number("temperature", "temperature"),
    _number("kd_ratio", "KD ratio"),
    _number("learning_rate", "learning rate", ".3~g"),
]


def _bands(num_stages: int, data: str = "bands") -> Spec:
    """Returns the layer that shows which stage is where."""
    return {
        "data": {"name": data},
        "mark": {"type": "rect", "opacity": 0.13, "tooltip": None},
        "encoding": {
            "x": {"field": "start", "type": "quantitative"},
            "x2": {"field": "end"},
            "fill": {
                "field": "stage",
                "type": "ordinal",
                "scale": _stage_scale(num_stages),
                "legend": None,
            },
        },
    }


def _band_names(num_stages: int) -> Spec:
    text = "name" if num_stages <= 6 else "stage"
    return {
        "data": {"name": "bands"},
        "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 3, "dy": -3,
                 "fontSize": 11, "tooltip": None},
        "encoding": {
            "x": {"field": "start", "type": "quantitative"},
            "y": {"value": 0},
            "text": {"field": text, "type": "nominal"},
        },
    }  # fmt: skip


def _x(last_step: int, *, is_labelled: bool) -> Spec:
    return {
        "field": "step",
        "type": "quantitative",
        "title": "step" if is_labelled else None,
        "scale": {"domain": [0, max(1, last_step)], "nice": False},
        "axis": {"labels": is_labelled, "ticks": is_labelled, "tickCount": 6, "grid": False,
                 "format": "~s"},
    }  # fmt: skip


def _crosshair(name: str, hovers: Sequence[str], x: Spec) -> list[Spec]:
    """Returns the layers that tell the step under the pointer, in this panel and all others."""
    return [
        {
            "data": {"name": "steps"},
            "params": [{"name": name, "select": {"type": "point", "on": "pointermove",
                        "clear": "pointerout", "nearest": True, "fields": ["step"]}}],
            "mark": {"type": "point", "opacity": 0, "size": 1},
            "encoding": {"x": x, "tooltip": _STEP_TOOLTIP},
        },
        {
            "data": {"name": "steps"},
            "transform": [{"filter": {"or": [{"param": h, "empty": False} for h in hovers]}}],
            "mark": {"type": "rule", "strokeWidth": 1, "tooltip": None, "strokeDash": [2, 2]},
            "encoding": {"x": x},
        },
    ]  # fmt: skip


def _loss_layers(x: Spec, mean_steps: int) -> list[Spec]:
    names = {"loss": "mean_loss", "KD": "mean_kd_loss", "CE": "mean_ce_loss",
             "KL at T = 1": "mean_kl"}  # fmt: skip
    parts = list(names)
    single: list[Spec] = [
        {
            "data": {"name": "steps"},
            "mark": {"type": "line", "opacity": 0.25, "strokeWidth": 1, "tooltip": None},
            "encoding": {"x": x, "y": _y("loss")},
        }
    ]
    means: Spec = {
        "data": {"name": "steps"},
        "transform": [
            {"calculate": f"datum.{column}", "as": part} for part, column in names.items()
        ] + [{"fold": parts, "as": ["part", "mean"]}],
        "mark": {"type": "line", "strokeWidth": 1.6, "tooltip": None},
        "encoding": {
            "x": x,
            "y": _y("mean"),
            "stroke": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": parts, "range": list(_PART_COLOURS.values())},
                "legend": {"title": None, "orient": "top", "direction": "horizontal"},
            },
            "strokeDash": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": parts, "range": list(_DASHES.values())},
                "legend": None,
            },
        },
    }  # fmt: skip
    return [*(single if mean_steps > 1 else []), means]


def _step_line(name: str, x: Spec, form: str = "~s") -> list[Spec]:
    return [
        {
            "data": {"name": "steps"},
            "mark": {"type": "line", "interpolate": "step", "strokeWidth": 1.6, "tooltip": None},
            "encoding": {"x": x, "y": _y(name, form=form)},
        }
    ]


def _dev_layers(x: Spec, title: str) -> list[Spec]:
    tooltip = [_number("step", "step", ","), _number("value", title)]
    return [
        {
            "data": {"name": "dev"},
            "mark": {"type": "line", "strokeWidth": 1.6, "point": {"filled": True, "size": 45}},
            "encoding": {"x": x, "y": _y("value"), "tooltip": tooltip},
        }
    ]


# The axis is one; the legend of the losses stays beside them.
_RESOLVE = {"scale": {"x": "shared", "stroke": "independent", "strokeDash": "independent"}}


def timeline(num_stages: int, last_step: int, mean_steps: int, dev_title: str | None) -> Spec:
    """Returns one axis of steps with panels: dev metric, losses, temperature, ratio, rate."""
    smooth = f" (means of {mean_steps} steps)" if mean_steps > 1 else ""
    panels = {
        "losses": (f"Loss = ratio × KD + (1 − ratio) × CE, nats per token{smooth}", 170),
        "temperature": ("Temperature", 54),
        "kd_ratio": ("KD ratio", 54),
        "learning_rate": ("Learning rate", 70),
    }
    if dev_title is not None:
        panels = {"dev": (dev_title, 110), **panels}
    hovers = [f"at_{name}" for name in panels]
    specs = []
    for index, (name, (title, height)) in enumerate(panels.items()):
        x = _x(last_step, is_labelled=index == len(panels) - 1)
        layers = {
            "dev": lambda x=x: _dev_layers(x, str(dev_title)),
            "losses": lambda x=x: _loss_layers(x, mean_steps),
            "learning_rate": lambda x=x: _step_line("learning_rate", x, ".0e"),
        }.get(name, lambda x=x, name=name: _step_line(name, x, "~r"))()  # type: ignore[misc]
        names = [_band_names(num_stages)] if index == 0 else []
        specs.append(
            {
                "title": {"text": title, "offset": 18 if index == 0 else 6},
                "height": height,
                "layer": [
                    _bands(num_stages),
                    *names,
                    *layers,
                    *_crosshair(hovers[index], hovers, x),
                ],
            }
        )
    return {"vconcat": specs, "spacing": 14, "resolve": _RESOLVE}


def over_steps(name: str, num_stages: int, last_step: int, *, scale: float = 1.0) -> Spec:
    """Returns a line of a column over the steps, `scale` times its values, with the stage bands."""
    x = _x(last_step, is_labelled=True)
    shown = {"calculate": f"datum.{name} * {scale!r}", "as": "shown"}
    line: Spec = {
        "data": {"name": "steps"},
        "transform": [shown],
        "mark": {"type": "line", "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": _y("shown"),
            "tooltip": [_number("step", "step", ","), _number("shown", name.replace("_", " "))],
        },
    }
    return {"height": 130, "layer": [_bands(num_stages), line]}


# ---------------------------------------------------------------------------------------- difficulty


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
                "scale": _stage_scale(num_stages),
                "legend": {"title": "first trained in stage", "orient": "top", "symbolOpacity": 1,
                           "labelExpr": "datum.value + 1"},
            },
            "tooltip": [
                {"field": "example_id", "type": "nominal", "title": "row"},
                _number("place", "place", ","),
                _number("rouge_l", "ROUGE-L", ".1%"),
                _number("cross_entropy", "cross-entropy"),
                _number("fused_score", "fused score", ".4~g"),
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
        "axis": {"tickCount": 5, "grid": False, "format": "~s"},
    }
    line: Spec = {
        "data": {"name": "ranking"},
        "mark": {"type": "line", "strokeWidth": 1.6},
        "encoding": {
            "x": x,
            "y": _y("fused_score", form=".2~g"),
            "tooltip": [
                _number("place", "place", ","),
                _number("fused_score", "fused score", ".4~g"),
            ],
        },
    }
    return {"height": 300, "layer": [_bands(num_stages, "rank_bands"), line]}


def quarter_bars(name: str, whens: Sequence[str], num_stages: int) -> Spec:
    """Returns bars of a score per quarter: before training and after each stage."""
    colours = [BEFORE_COLOUR, *stage_colours(num_stages)]
    places = [0 if when == "before" else int(when.rpartition(" ")[2]) for when in whens]
    return {
        "height": 180,
        "data": {"name": "quarters"},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "quarter", "type": "nominal", "title": None,
                  "axis": {"labelAngle": 0, "ticks": False}, "scale": {"paddingInner": 0.25}},
            "xOffset": {"field": "order", "type": "ordinal"},
            "y": _y(name),
            "fill": {
                "field": "when",
                "type": "nominal",
                "scale": {"domain": list(whens), "range": [colours[place] for place in places]},
                "legend": {"title": None, "orient": "top"},
            },
            "tooltip": [
                {"field": "quarter", "type": "nominal", "title": "quarter"},
                {"field": "when", "type": "nominal", "title": "when"},
                _number(name, name.replace("_", " ")),
                _number("num_rows", "rows", ","),
            ],
        },
    }  # fmt: skip


def time_bars() -> Spec:
    """Returns the seconds of each step of the run."""
    return {
        "height": {"step": 24},
        "data": {"name": "times"},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None,
                  "axis": {"ticks": False, "domain": False}},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds",
                  "axis": {"tickCount": 4, "format": "~s"}},
            "tooltip": [_number("seconds", "seconds")],
        },
    }  # fmt: skip


def intervals(data: str, title: str) -> Spec:
    """Returns differences with their intervals, a row each (`name`, `value`, `low`, `high`)."""
    y: Spec = {"field": "name", "type": "nominal", "title": None, "sort": None}
    tooltip = [
        {"field": "name", "type": "nominal", "title": "method"},
        *(_number(name, name, "+.2f") for name in ("value", "low", "high")),
    ]
    shared: Spec = {"data": {"name": data}}
    return {
        "height": {"step": 26},
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
                    "tooltip": tooltip,
                },
            },
            {
                **shared,
                "mark": {"type": "circle", "size": 70, "opacity": 1},
                "encoding": {
                    "y": y,
                    "x": {"field": "value", "type": "quantitative"},
                    "tooltip": tooltip,
                },
            },
        ],
    }
