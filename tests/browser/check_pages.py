"""The HTML pages in a headless Chromium, from file://: no error, no request, every chart drawn.

Needs Chromium and the extra `browser` (playwright drives the browser that is there; it downloads
none). Screenshots go to $POCL_SCREENSHOTS, by default dist/screenshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_dist.files import atomic_write_text, read_json_lines
from pocl_dist.pipeline.report import report
from pocl_dist.pipeline.report_page.comparison_page import comparison_page
from pocl_dist.pipeline.report_page.page import chart_library, render
from tests.report_runs import COMPARISON, TABLES, write_metrics, write_run, write_whole_run

playwright = pytest.importorskip(
    "playwright.sync_api", reason="SKIPPED: pip install 'pocl_dist[browser]'"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip(f"SKIPPED: none of {', '.join(NAMES)} is installed", allow_module_level=True)

SCREENSHOTS = Path(os.environ.get("POCL_SCREENSHOTS", "dist/screenshots"))
SCREENS = {"desktop": (1280, 900), "tablet": (768, 1000), "phone": (390, 844)}
PATIENCE = 120_000.0  # milliseconds; the machine may be busy
# The share of pixels of a canvas that are not like its first one, and how many colours there are.
LOOK = """canvas => {
    const {width, height} = canvas;
    const pixels = new Uint32Array(
        canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer);
    let others = 0;
    for (const pixel of pixels) others += pixel !== pixels[0] ? 1 : 0;
    return {width, height, share: others / pixels.length, colours: new Set(pixels).size};
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns {name: file}: a whole run, one that stopped, one that is only planned, a comparison.

    Their rows and answers try to break out of the page.
    """
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    config, run = write_whole_run(folder / "whole", num_rows=200)
    report(config, run)
    found["whole"] = run.root / "report.html"
    config, run = write_run(folder / "stopped")
    write_metrics(run, last_step=5)
    report(config, run)
    found["stopped"] = run.root / "report.html"
    config, run = write_run(folder / "planned")
    report(config, run)
    found["planned"] = run.root / "report.html"
    found["comparison"] = folder / "comparison.html"
    page = comparison_page("compared", COMPARISON, TABLES, ["Seeds 1, 2."])
    atomic_write_text(found["comparison"], render(page, chart_library()))
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in the browser, with all that it said, asked for or popped up."""

    def __init__(self, browser, file: Path, screen: str, scheme: str) -> None:  # type: ignore[no-untyped-def]
        width, height = SCREENS[screen]
        self.width = width
        self.page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri(), timeout=PATIENCE)
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("html[data-ready=true]", state="attached", timeout=PATIENCE)

    def assert_charts_are_drawn(self) -> int:
        figures = self.page.locator("[data-chart]")
        for index in range(figures.count()):
            figure = figures.nth(index)
            name = figure.get_attribute("data-chart")
            look = figure.locator("canvas").evaluate(LOOK)
            assert look["width"] >= 250 and look["height"] >= 60, (name, look)
            assert look["share"] > 0.005 and look["colours"] >= 4, (name, look)
            box = figure.locator("canvas").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= self.width, (name, box)
        return int(figures.count())


VIEWS = [("whole", screen, scheme) for screen in SCREENS for scheme in ("light", "dark")]
VIEWS += [
    (name, *view)
    for name in ("stopped", "planned", "comparison")
    for view in (("desktop", "light"), ("phone", "dark"))
]


@pytest.mark.parametrize(("name", "screen", "scheme"), VIEWS)
def test_a_page_opens_from_a_file_without_an_error_and_shows_its_charts(
    browser: object, pages: dict[str, Path], name: str, screen: str, scheme: str
) -> None:
    opened = Opened(browser, pages[name], screen, scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}-{screen}-{scheme}.png"
    opened.page.screenshot(path=path, full_page=True, timeout=PATIENCE)
    num_charts = opened.assert_charts_are_drawn()
    assert num_charts == {"whole": 11, "stopped": 11, "planned": 3, "comparison": 2}[name]
    wide = opened.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= opened.width, "the page must not scroll sideways"
    shade = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, shade.strip("rgb()").split(","))) < 300
    assert is_dark == (scheme == "dark")
    assert opened.asked == [pages[name].as_uri()], "it asks for nothing but itself"
    assert opened.said == []
    opened.page.close()


def test_the_theme_button_changes_page_and_charts(browser: object, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["whole"], "desktop", "light")
    page = opened.page
    seen = []
    for expected in ("auto", "light", "dark", "auto"):
        assert page.locator("#theme").inner_text() == f"theme: {expected}"
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#theme").click()
        opened.wait()
    assert seen[0] == seen[1] == seen[3] != seen[2]
    opened.assert_charts_are_drawn()
    assert opened.said == []
    page.close()


def test_the_pointer_tells_the_numbers_of_a_step(browser: object, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["whole"], "desktop", "light")
    page = opened.page
    figure = page.locator("[data-chart=timeline]")
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    for distance in (300, 305):
        page.mouse.move(box["x"] + distance, box["y"] + 260)
        page.wait_for_timeout(500)
    page.wait_for_selector("#vg-tooltip-element.visible", timeout=PATIENCE)
    cells = page.locator("#vg-tooltip-element td").all_inner_texts()
    told = dict(zip(cells[::2], cells[1::2], strict=True))
    rows = read_json_lines(pages["whole"].with_name("metrics.jsonl"))
    step = int(told["step"].replace(",", ""))
    row = next(row for row in rows if row["kind"] == "step" and row["step"] == step)
    assert float(told["loss"]) == pytest.approx(row["loss"], rel=1e-3)
    assert int(told["stage"]) == int(str(row["stage"])) + 1
    assert opened.said == []
    page.close()


def test_the_filters_show_the_answers_that_fit(browser: object, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["whole"], "phone", "dark")
    page = opened.page
    cases = page.locator(".case")
    visible = page.locator(".case:not([hidden])")
    assert cases.count() == 100 and visible.count() == 8
    page.locator("#more").click()
    assert visible.count() == 28
    page.locator("[name=outcome]").select_option("worse")
    count = page.locator(".case[data-outcome=worse]").count()
    assert page.locator("#filters output").inner_text() == f"{count} of 100"
    assert visible.count() == min(count, 28)
    page.locator("[name=order]").select_option("loss")
    gains = [float(text) for text in page.locator(".case:not([hidden]) .gain").all_inner_texts()]
    assert gains == sorted(gains) and gains[-1] < 0
    page.locator("[name=text]").fill("no such words")
    assert visible.count() == 0
    assert opened.said == []
    page.close()
