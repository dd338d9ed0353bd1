"""Vega-Lite specifications of the charts over the steps of training, with the stages behind."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.pipeline.report_page.chart_parts import Spec, number, stage_bands, y_axis

# Not the colours of stages: violet and brown, and the colour of the text for the sum.
_PART_COLOURS = {"loss": "text", "KD": "#8E6BBF", "CE": "#A07B44", "KL at T = 1": "#8C8C8C"}
_DASHES = {"loss": [1, 0], "KD": [1, 0], "CE": [1, 0], "KL at T = 1": [3, 3]}

_STEP_TOOLTIP = [
    number("step", "step", ","),
    number("stage_shown", "stage", "d"),
    number("loss", "loss"),
    number("kd_loss", "KD"),
    number("ce_loss", "CE"),
    number("kl", "KL at T = 1"),
    number("temperature", "temperature"),
    number("kd_ratio", "KD ratio"),
    number("learning_rate", "learning rate", ".3~g"),
]


def _band_names() -> Spec:
    return {
        "data": {"name": "bands"},
        "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 2, "dy": -3,
                 "fontSize": 11, "tooltip": None},
        "encoding": {
            "x": {"field": "start", "type": "quantitative"},
            "y": {"value": 0},
            "text": {"field": "label", "type": "nominal"},
        },
    }  # fmt: skip


def _x(last_step: int, *, is_labelled: bool) -> Spec:
    return {
        "field": "step",
        "type": "quantitative",
        "title": "step" if is_labelled else None,
        "scale": {"domain": [0, max(1, last_step)], "nice": False},
        "axis": {"labels": is_labelled, "ticks": is_labelled, "tickCount": 6, "grid": False,
                 "format": ",d" if last_step < 20_000 else "~s"},
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
            "encoding": {"x": x, "y": y_axis("loss")},
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
            "y": y_axis("mean"),
            "stroke": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": parts, "range": list(_PART_COLOURS.values())},
                "legend": {"title": None, "orient": "top", "symbolType": "stroke", "columns": 4},
            },
            "strokeDash": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": parts, "range": list(_DASHES.values())},
            },
        },
    }  # fmt: skip
    return [*(single if mean_steps > 1 else []), means]


def _step_line(name: str, x: Spec, form: str = ".3~g") -> list[Spec]:
    return [
        {
            "data": {"name": "steps"},
            "mark": {"type": "line", "interpolate": "step", "strokeWidth": 1.6, "tooltip": None},
            "encoding": {"x": x, "y": y_axis(name, form=form)},
        }
    ]


def _dev_layers(x: Spec, title: str) -> list[Spec]:
    tooltip = [number("step", "step", ","), number("value", title)]
    return [
        {
            "data": {"name": "dev"},
            "mark": {"type": "line", "strokeWidth": 1.6, "point": {"filled": True, "size": 45}},
            "encoding": {"x": x, "y": y_axis("value"), "tooltip": tooltip},
        }
    ]


# The axis is one; the legend of the losses stays beside them.
_RESOLVE = {"scale": {"x": "shared", "stroke": "independent", "strokeDash": "independent"}}


def timeline(num_stages: int, last_step: int, mean_steps: int, dev_title: str | None) -> Spec:
    """Returns one axis of steps with panels: dev metric, losses, temperature, ratio, rate."""
    smooth = f" (means of {mean_steps} steps)" if mean_steps > 1 else ""
    panels = {
        "losses": (f"Loss, nats{smooth}", 170),
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
        }.get(name, lambda x=x, name=name: _step_line(name, x, "~r"))()
        names = [_band_names()] if index == 0 else []
        specs.append(
            {
                "title": {"text": title, "offset": 18 if index == 0 else 6},
                "height": height,
                "layer": [
                    stage_bands(num_stages),
                    *names,
                    *layers,
                    *_crosshair(hovers[index], hovers, x),
                ],
            }
        )
    return {"vconcat": specs, "spacing": 14, "resolve": _RESOLVE}


def over_steps(
    name: str, num_stages: int, last_step: int, *, scale: float = 1.0, form: str = ".3~g"
) -> Spec:
    """Returns a line of a column over the steps, `scale` times its values, with the stage bands."""
    x = _x(last_step, is_labelled=True)
    shown = {"calculate": f"datum.{name} * {scale!r}", "as": "shown"}
    line: Spec = {
        "data": {"name": "steps"},
        "transform": [shown],
        "mark": {"type": "line", "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": y_axis("shown", form=form),
            "tooltip": [number("step", "step", ","), number("shown", name.replace("_", " "))],
        },
    }
    return {"height": 130, "layer": [stage_bands(num_stages), line]}
