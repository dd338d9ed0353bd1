"""Settings of Sphinx, which builds the documentation from this folder: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

from pocl_dist import __version__  # noqa: E402

project = "pocl_dist"
author = "the authors of pocl_dist"
project_copyright = "Apache-2.0"
version = release = __version__

# `generated` fills in what the code knows, `formulas` draws TeX: no page needs a script for it, so
# all of them open from file:// on a machine without a network.
extensions = ["myst_parser", "generated", "formulas"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["extensions", "static"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "svg"

html_theme = "furo"
html_title = f"pocl_dist {version}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # a browser fetches no pages for it from file://
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
