"""Formulas as SVG, drawn while the site is built: no script, no font, no network for the reader.

ziamath sets them from its own font (STIX Two Math). Sphinx asks for a renderer under a name
(`html_math_renderer`). The picture takes the text's colour and size; its label is the TeX source.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

_PIXELS_PER_EM = 16.0
_MAX_HEIGHT_EM = (
    8.0  # ziamath 0.13 draws \\left( ... \\right) around some sums a hundred lines tall
)
ziamath.config.svg2 = False  # outlines in place: glyphs with ids would meet those of other formulas


@cache
def _svg(tex: str, *, is_inline: bool) -> str:
    """Returns the formula as an SVG element whose baseline is that of the text around it."""
    formula = ziamath.Latex(tex, size=_PIXELS_PER_EM, color="currentColor", inline=is_inline)
    text = formula.svg()
    found = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', text)
    assert found is not None, "an SVG of ziamath has a viewBox"
    _, top, width, height = (float(number) / _PIXELS_PER_EM for number in found.groups())
    if height > _MAX_HEIGHT_EM:
        raise ValueError(f"formula of {height:.0f} em: {tex}; take \\Big( for \\left(")
    style = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-(top + height):.3f}em"
    head = f'<svg class="formula" role="img" aria-label="{escape(tex)}" style="{style}" '
    return re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*" ', rf"{_quoted(head)}\1", text, count=1)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\")


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_svg(node.astext(), is_inline=True))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    picture = _svg(node.astext(), is_inline=False)
    self.body.append(f'<div class="formula">{picture}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Registers the renderer."""
    app.add_html_math_renderer("svg", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
