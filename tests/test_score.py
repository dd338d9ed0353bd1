"""score: the published figures, how rows are joined, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_dist.errors import DataError, MissingInputError
from pocl_dist.pipeline.score import score_files
from tests.conftest import SHARED


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(answer: str | list[str], example_id: str | None = None) -> dict[str, object]:
    given: dict[str, object] = {} if example_id is None else {"id": example_id}
    return {"instruction": "say it", "output": answer, **given}


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} with the published answers is not there")
def test_the_published_answers_get_the_published_scores() -> None:
    summary = score_files(
        SHARED / "golden" / "dolly_answers_seed10.jsonl", SHARED / "data" / "dolly_valid.jsonl"
    )
    assert round(summary.rouge_l, 4) == 24.2393
    assert round(summary.exact_match, 4) == 2.8
    assert summary.num_examples == 500


def test_rows_are_joined_by_id_when_all_have_one(tmp_path: Path) -> None:
    references = write_lines(tmp_path / "r.jsonl", [row("one", "a"), row(["no", "two"], "b")])
    predictions = write_lines(
        tmp_path / "p.jsonl", [{"id": "b", "text": "two"}, {"id": "a", "text": "x"}]
    )
    assert score_files(predictions, references).exact_match == 50.0


@pytest.mark.parametrize("last_id", [None, "b"])
def test_rows_are_joined_by_line_unless_all_rows_of_both_have_ids(
    tmp_path: Path, last_id: str | None
) -> None:
    references = write_lines(tmp_path / "r.jsonl", [row("one", "a"), row("two", last_id)])
    ids = {"id": "b"} if last_id is None else {}
    predictions = write_lines(tmp_path / "p.jsonl", [{**ids, "text": "one"}, {"text": "two"}])
    assert score_files(predictions, references).exact_match == 100.0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([{"text": "x"}], [row("x"), row("y")], r"r\.jsonl: row 2 has no answer"),
        ([{"text": "x"}, {"text": "y"}], [row("x")], r"p\.jsonl:2: has no row"),
        ([{"id": "z", "text": "x"}], [row("x", "a")], r"p\.jsonl:1: id 'z' is not in"),
        (
            [{"id": "a", "text": "x"}],
            [row("x", "a"), row("y", "b")],
            r"r\.jsonl: row 2: id 'b' has no answer",
        ),
        (
            [{"text": "x"}, {"txt": "y"}],
            [row("x"), row("y")],
            r"p\.jsonl:2: field 'text' is missing",
        ),
        ([{"text": None}], [row("x")], r"p\.jsonl:1: field 'text' is NoneType"),
        ([{"text": "x"}, ["y"]], [row("x"), row("y")], r"p\.jsonl:2: not a JSON object"),
        (
            [{"id": 1, "text": "x"}, {"id": "1", "text": "y"}],
            [row("x")],
            r"p\.jsonl:2: id '1' is that of row 1",
        ),
        (
            [{"text": "x"}],
            [{"instruction": "a", "output": None}],
            r"r\.jsonl:1: field 'output' is null",
        ),
        ([], [row("x")], r"p\.jsonl: holds no row"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_file_and_row(
    tmp_path: Path, predictions: list[object], references: list[object], message: str
) -> None:
    files = [
        write_lines(tmp_path / name, rows)
        for name, rows in (("p.jsonl", predictions), ("r.jsonl", references))
    ]
    with pytest.raises(DataError, match=message):
        score_files(*files)


def test_a_missing_file_is_named_with_its_option(tmp_path: Path) -> None:
    references = write_lines(tmp_path / "r.jsonl", [row("x")])
    with pytest.raises(MissingInputError, match=r"--predictions: .*p\.jsonl does not exist"):
        score_files(tmp_path / "p.jsonl", references)


def test_scoring_loads_no_torch(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / "p.jsonl", [{"text": "x"}]),
        write_lines(tmp_path / "r.jsonl", [row("x")]),
    ]
    code = (
        "import sys; from pathlib import Path; from pocl_dist.pipeline.score import score_files;"
        "score_files(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print({'torch', 'transformers', 'ray', 'deepspeed', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
