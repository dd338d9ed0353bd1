"""The report: the numbers are those of the files, texts stay texts, what is missing is marked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pocl_dist.config import Config, load_config
from pocl_dist.errors import MissingInputError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.pipeline.report import report
from pocl_dist.pipeline.report_numbers import results, time_rows
from pocl_dist.pipeline.report_page import page as page_module
from pocl_dist.pipeline.report_page.chart_parts import stage_colours
from pocl_dist.pipeline.report_page.comparison_page import comparison_page
from pocl_dist.pipeline.report_page.gather import gather
from pocl_dist.pipeline.report_page.page import as_json, chart_library, render
from pocl_dist.pipeline.report_page.run_page import run_page
from pocl_dist.pipeline.report_page.thinning import evenly, running_mean, thinned
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.report_runs import (
    COMPARISON,
    NASTY,
    TABLES,
    write_eval,
    write_metrics,
    write_run,
    write_whole_run,
)

LIBRARY = "/* the charts' library */"


class Parsed(HTMLParser):
    """What a browser makes of a page: its elements, and the texts of scripts and the rest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._is_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[-1] += data
        else:
            self.text += data


def page_of(config: Config, run: RunDirectory) -> tuple[str, dict]:
    """Returns the page of a run, without the library, and the data of its charts."""
    numbers = results(run) | {"time": time_rows(run)}
    html = render(run_page(gather(config, run, numbers)), LIBRARY)
    return html, json.loads(Parsed(html).scripts[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDirectory]:
    return write_whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def html(whole: tuple[Config, RunDirectory]) -> str:
    return page_of(*whole)[0]


def test_the_data_of_the_charts_are_the_numbers_of_the_files(
    whole: tuple[Config, RunDirectory], html: str
) -> None:
    data = json.loads(Parsed(html).scripts[0])["datasets"]
    rows = read_json_lines(whole[1].metrics)
    steps = [row for row in rows if row["kind"] == "step"]
    for name in ("step", "stage", "loss", "kd_loss", "ce_loss", "kl", "learning_rate"):
        assert data["steps"][name] == [row[name] for row in steps]
    dev = [row for row in rows if row["kind"] == "dev"]
    assert data["dev"]["value"] == [row["value"] for row in dev]
    quarters = [row for row in rows if row["kind"] == "quarters"]
    for name in ("rouge_l", "cross_entropy", "kl"):
        assert data["quarters"][name] == [value for row in quarters for value in row[name]]
    assert data["quarters"]["when"][::4] == ["before"] + [f"stage {n}" for n in (1, 2, 3, 4)]
    ranking = data["ranking"]
    assert ranking["place"] == list(range(1, 25))
    assert ranking["stage"] == [place // 6 for place in range(24)]
    assert ranking["fused_score"] == sorted(ranking["fused_score"], reverse=True)
    assert data["times"] == {"name": ["measure", "plan", "distill"], "seconds": [12.5, 0.5, 100.0]}


def test_the_headlines_and_tables_are_those_of_the_reports(
    whole: tuple[Config, RunDirectory], html: str
) -> None:
    text = Parsed(html).text
    scores = read_json(whole[1].eval / "train" / "report.json")
    after, before = scores["rouge_l"], scores["baselines"]["student_before"]["rouge_l"]
    teacher = scores["baselines"]["teacher"]["rouge_l"]
    share = (after - before) / (teacher - before)
    for value in (after, before, teacher):
        assert f"{value:.2f}" in text
    assert (f"{share:.0%} of the gap closed" in text) == (teacher > before)
    assert "11.5% of it measuring and planning" in text


def test_answers_and_rows_are_texts_whatever_they_hold(html: str) -> None:
    parsed = Parsed(html)
    assert parsed.tags.count("script") == 3 and "img" not in parsed.tags
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert parsed.text.count(NASTY) > 24 and "49" not in re.findall(r"\{\{.*?\}\}", parsed.text)
    assert parsed.scripts[1] == LIBRARY
    assert "<" not in parsed.scripts[0], "JSON inside a script cannot end it"


@pytest.mark.parametrize("text", [NASTY, "<!--", "]]>", "\u2029", "\ud800", "\x00"])
def test_json_in_a_script_says_the_same_without_a_character_that_html_knows(text: str) -> None:
    written = as_json({"text": text})
    assert json.loads(written) == {"text": text}
    assert not set(written) & set("<>&\u2028\u2029")


def test_a_text_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    config, run = write_run(tmp_path)
    write_metrics(run)
    rows = [{"id": "a", "seed": 1, "prompt": "p\ud800", "context": "", "references": ["r"],
             "answer": "\ud800", "rouge_l": 0.0, "exact_match": 0.0}]  # fmt: skip
    write_eval(run, has_baselines=False)
    (run.eval / "train" / "answers.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert page_of(config, run)[0].encode()


def test_the_policy_names_the_two_scripts_and_forbids_the_network(html: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]  # type: ignore[index]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    scripts = Parsed(html).scripts
    assert rules["script-src"].split() == [page_module._hash(source) for source in scripts[1:]]
    assert "connect-src" not in rules and "unsafe" not in policy
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html) == []


# ------------------------------------------------------------------------- what is missing or mixed


def _nothing_trained(folder: Path) -> tuple[Config, RunDirectory]:
    return write_run(folder)


def _stopped(folder: Path) -> tuple[Config, RunDirectory]:
    config, run = write_run(folder)
    write_metrics(run, last_step=5)
    return config, run


def _not_evaluated(folder: Path) -> tuple[Config, RunDirectory]:
    config, run = write_run(folder)
    write_metrics(run)
    run.export.mkdir()
    (run.export / "config.json").write_text("{}")
    return config, run


def _one_stage(folder: Path) -> tuple[Config, RunDirectory]:
    config, run = write_run(folder, curriculum={"num_stages": 1, "ordering": "curriculum"})
    for file in run.difficulty.iterdir():
        file.unlink()
    return config, run


def _without_baselines(folder: Path) -> tuple[Config, RunDirectory]:
    config, run = _stopped(folder)
    write_eval(run, has_baselines=False)
    return config, run


def _other_config(folder: Path) -> tuple[Config, RunDirectory]:
    _, run = _stopped(folder)
    other = load_config([folder / "config.yaml"], ["data.template=alpaca"])
    return other, run


def _half_difficulty(folder: Path) -> tuple[Config, RunDirectory]:
    config, run = _stopped(folder)
    (run.difficulty / "shard-00000.parquet").write_bytes(b"torn")
    return config, run


PARTIAL: dict[str, tuple[Callable[[Path], tuple[Config, RunDirectory]], str, str]] = {
    "planned only": (_nothing_trained, "missing", "no step of training yet"),
    "stopped in stage 2": (_stopped, "unfinished", "training stands in stage 2 of 4, at step 5 of"),
    "not evaluated": (_not_evaluated, "missing", "no test answers yet"),
    "one stage": (_one_stage, "missing", "no difficulty scores: a run with one stage"),
    "no baselines": (_without_baselines, "missing", "only the trained student answered"),
    "another config": (_other_config, "mixed", "data.template is 'short', in config.yaml 'alpaca'"),
    "a damaged shard": (_half_difficulty, "missing", "no answers to training rows"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_run_that_is_not_whole_is_reported_and_marked(tmp_path: Path, name: str) -> None:
    make, kind, text = PARTIAL[name]
    config, run = make(tmp_path)
    numbers = results(run) | {"time": time_rows(run)}
    found = gather(config, run, numbers)
    assert any(kind == f.kind and text in f.text and f.remedy for f in found.findings)
    html, data = page_of(config, run)
    assert text in Parsed(html).text
    assert ("This report is not of a whole run" in html) == any(
        finding.kind != "missing" for finding in found.findings
    )
    drawn = {value for key, value in Parsed(html).attributes if key == "data-chart"}
    assert drawn == set(data["charts"]), "no empty frame, no chart without a place"
    names = re.findall(r'"data":\{"name":"(\w+)"\}', as_json(data["charts"]))
    assert set(names) <= set(data["datasets"])


def test_a_whole_run_has_no_mark(whole: tuple[Config, RunDirectory], html: str) -> None:
    found = gather(*whole, results(whole[1]) | {"time": {}})
    kinds = [finding for finding in found.findings if finding.kind != "mixed"]
    assert kinds == [], "mixed: the models of this run are made up"


def test_nothing_at_all_is_66(tmp_path: Path) -> None:
    config = load_config([write_run(tmp_path)[1].root / "config.yaml"])
    with pytest.raises(MissingInputError, match="nothing to report"):
        report(config, RunDirectory(tmp_path / "empty"))


def test_report_writes_both_files_with_the_same_numbers_and_the_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, run = write_whole_run(tmp_path)
    report(config, run)
    value = read_json(run.root / "report.json")
    html = (run.root / "report.html").read_text()
    assert chart_library() in html and "</script" not in chart_library()
    data = json.loads(Parsed(html).scripts[0])["datasets"]
    of_json = [row["rouge_l"] for row in value["quarters"]]
    assert [x for row in of_json for x in row] == data["quarters"]["rouge_l"]
    assert value["stages"] == results(run)["stages"] and value["eval"] == results(run)["eval"]
    assert "ROUGE-L by difficulty quarter" in capfd.readouterr().out
    assert len(html) < 1_300_000


# ---------------------------------------------------------------------------------- bounded in size


def test_of_many_steps_the_ends_and_the_extremes_are_drawn(tmp_path: Path) -> None:
    config, run = write_run(tmp_path, num_rows=600, curriculum={"epochs_per_stage": 30})
    rows = [row for row in write_metrics(run) if row["kind"] == "step"]
    assert len(rows) > 5000
    _, data = page_of(config, run)
    steps = data["datasets"]["steps"]
    assert len(steps["step"]) <= 2000
    assert (steps["step"][0], steps["step"][-1]) == (1, len(rows))
    for name in ("loss", "kd_loss", "ce_loss", "kl", "grad_norm", "tokens_per_second"):
        values = [row[name] for row in rows]
        assert (min(steps[name]), max(steps[name])) == (min(values), max(values))
    for stage in range(4):
        of_stage = [row["step"] for row in rows if row["stage"] == stage]
        assert {of_stage[0], of_stage[-1]} <= set(steps["step"])
    for place, step in enumerate(steps["step"]):
        assert steps["loss"][place] == rows[step - 1]["loss"]
    html = render(run_page(gather(config, run, results(run) | {"time": {}})), LIBRARY)
    assert f"{len(steps['step']):,} of {len(rows):,} steps are drawn" in html


@pytest.mark.parametrize("limit", [40, 41, 100, 999])
def test_thinning_keeps_within_its_limit_and_in_order(limit: int) -> None:
    rows = [{"x": (index * 37) % 101, "y": -index, "g": index // 400} for index in range(1000)]
    places = thinned(rows, "x", ["y"], "g", limit)
    assert len(places) <= limit and places == sorted(set(places))
    assert {0, 399, 400, 799, 800, 999} <= set(places)
    assert thinned(rows[:limit], "x", ["y"], "g", limit) == list(range(limit))


def test_running_means_are_means_of_neighbours() -> None:
    assert running_mean([1, 2, 6, None], 1) == [1.5, 3.0, 4.0, 6.0]
    assert running_mean([5, 7], 0) == [5, 7] and running_mean([None], 3) == [None]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 2999, 3000, 3001, 10_000_000])
def test_an_even_stride_takes_no_more_than_the_limit(num_rows: int) -> None:
    stride = evenly(num_rows, 3000)
    taken = len(range(0, num_rows, stride)) + ((num_rows - 1) % stride != 0)
    assert taken <= 3000 and (stride == 1) == (num_rows <= 3000)


def test_answers_are_few_whatever_the_test_sets_hold(tmp_path: Path) -> None:
    config, run = write_run(tmp_path, report={"answers": 30})
    write_metrics(run)
    write_eval(run, num_rows=500)
    cases = gather(config, run, results(run) | {"time": {}}).cases
    groups = [case.group for case in cases]
    assert len(cases) == 30 and set(groups) == {"test set train", "training rows"}
    again = gather(config, run, results(run) | {"time": {}}).cases
    assert again == cases, "drawn by seed"
    for case in cases[:20]:
        assert [answer.model for answer in case.answers] == ["teacher", "student_before", "student"]
        assert all(case.example_id.split("-")[1] in answer.text for answer in case.answers)


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_stages_have_colours_of_their_own(num_stages: int) -> None:
    colours = stage_colours(num_stages)
    assert len(set(colours)) == num_stages
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in colours)


def test_a_comparison_page_shows_its_tables_and_the_differences_of_the_average() -> None:
    html = render(comparison_page("compared", COMPARISON, TABLES, ["Seeds 1, 2."]), LIBRARY)
    parsed = Parsed(html)
    assert parsed.tags.count("script") == 3 and "img" not in parsed.tags
    cells = [cell for line in TABLES["ROUGE-L"] for cell in line]
    assert all(cell in parsed.text for cell in cells) and "Seeds 1, 2." in parsed.text
    assert COMPARISON["marks"][0] in parsed.text
    data = json.loads(parsed.scripts[0])
    assert data["datasets"]["differences_rouge_l"] == {
        "name": ["forward_kl-pocl − forward_kl-kd", "reverse_kl-pocl − reverse_kl-kd"],
        "value": [0.4, -2.5],
        "low": [-0.6, -3.5],
        "high": [1.4, -1.5],
    }
    assert set(data["charts"]) == {"differences_rouge_l", "differences_exact_match"}
