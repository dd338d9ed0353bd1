"""What the charts share: a colour per stage, axes, tooltips, and the bands that show the stages.

Colour means one thing on the whole page: the stage. Widths, and the colours of text and lines,
come from the page (page.js), which knows the screen and whether it is dark.
"""

from __future__ import annotations

Spec = dict[str, object]

# Okabe and Ito (2008), told apart by all kinds of colour vision; cool to warm is easy to hard.
_STAGE_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_OF_COUNT = {1: (4,), 2: (1, 4), 3: (1, 3, 4), 4: (1, 2, 3, 4), 5: (0, 1, 2, 3, 4)}
BEFORE_COLOUR = "#8C8C8C"


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


def stage_scale(num_stages: int) -> Spec:
    return {"domain": list(range(num_stages)), "range": stage_colours(num_stages)}


def number(name: str, title: str, form: str = ",.4~r") -> Spec:
    """Returns a line of a tooltip."""
    return {"field": name, "type": "quantitative", "title": title, "format": form}


def y_axis(name: str, *, from_zero: bool = True, form: str = ".3~g") -> Spec:
    return {
        "field": name,
        "type": "quantitative",
        "title": None,
        "scale": {"zero": from_zero, "nice": 3},
        "axis": {"tickCount": 3, "format": form},
    }


def stage_bands(num_stages: int, data: str = "bands") -> Spec:
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
                "scale": stage_scale(num_stages),
                "legend": None,
            },
        },
    }
