"""From template, charts and data to one HTML file that asks for nothing but itself.

What comes from a run is text: Jinja2 escapes it, and the data stand as JSON in which no `<` is
left. The security policy of the page names its two scripts by their hash and forbids the network,
so that what slipped through would neither run nor report home.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from pocl_dist import __version__
from pocl_dist.pipeline.report_page.chart_parts import Spec
from pocl_dist.pipeline.report_page.series import Columns

_TEMPLATES = files("pocl_dist.pipeline.report_page") / "templates"
# Vega-Lite's version decides how a specification looks: named, not "the latest".
VEGA_LITE = "6.4"


@dataclass(frozen=True)
class Page:
    """What a page shows: values for its template, charts by name, their data sets by columns."""

    template: str
    values: Mapping[str, object]
    charts: Mapping[str, Spec] = field(default_factory=dict)
    datasets: Mapping[str, Columns] = field(default_factory=dict)


@cache
def chart_library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script that leaves `vegaEmbed` behind.

    Bundled by vl-convert from what its wheel holds: no network; 2 s.
    """
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return f"(() => {{\n{bundle}\n}})();"


def as_json(value: object) -> str:
    """Returns JSON that may stand inside a script element: whatever a text holds, it stays one."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _source(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def policy(scripts: list[str], style: str) -> str:
    """Returns the content security policy of a page that runs these and nothing else."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def render(page: Page, library: str) -> str:
    """Returns the page as HTML; `library` is the charts' (`chart_library`)."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _source("page.css"), _source("page.js")
    html: str = environment.get_template(page.template).render(
        **page.values,
        charts=page.charts,
        version=__version__,
        policy=policy([library, script], style),
        style=style,
        library=library,
        script=script,
        data=as_json({"charts": page.charts, "datasets": page.datasets}),
    )
    return html.encode("utf-8", "replace").decode()  # answers may hold halves of characters
