"""evaluate on real actors: figures that score agrees with, seeds, baselines, refusals."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from pocl_dist.config import Config
from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.pipeline.eval_report import read_figures
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.score import score_files
from tests.fixtures_models import make_run, write_varied_rows
from tests.fixtures_models import ray_of_module as ray_of_module

Pair = tuple[Path, Path, Path]
SAMPLED = {"do_sample": True, "seeds": [10, 20], "temperature": 0.7, "top_p": 0.9}


def write_test_sets(folder: Path) -> list[str]:
    """Writes two test sets; rows of the second have two references, one often right in part."""
    rows = [
        json.loads(line)
        for line in write_varied_rows(folder / "one.jsonl", 10).read_text().splitlines()
    ]
    several = [{**row, "output": [row["output"], "it it it"]} for row in rows[:7]]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    return [str(folder / "one.jsonl"), str(folder / "two.jsonl")]


def make_evaluated_run(folder: Path, pair: Pair, **sections: object) -> tuple[Config, RunDirectory]:
    """Returns a run: its export is the student, its student before training the teacher."""
    folder.mkdir(exist_ok=True)
    teacher, student, train = pair
    data = {"eval": write_test_sets(folder)}
    config, run = make_run(folder, teacher, train, teacher, data=data, **sections)
    shutil.copytree(student, run.export)
    return config, run


@pytest.fixture(scope="module")
def sampled(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> tuple[Config, RunDirectory]:
    config, run = make_evaluated_run(
        tmp_path_factory.mktemp("sampled"), tiny_pair, evaluate=SAMPLED
    )
    evaluate(config, run)
    return config, run


def answers_of(run: RunDirectory, name: str, file: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.eval / name / file).read_text().splitlines()]


@pytest.mark.parametrize("index", [0, 1])
def test_the_report_is_what_score_says_of_the_answers(
    sampled: tuple[Config, RunDirectory], tmp_path: Path, index: int
) -> None:
    config, run = sampled
    references = Path(config.data.eval[index])
    report = json.loads((run.eval / references.stem / "report.json").read_text())
    answers = answers_of(run, references.stem)
    expected = []
    for seed in (10, 20):
        predictions = tmp_path / f"{seed}.jsonl"
        rows = [{"id": row["id"], "text": row["answer"]} for row in answers if row["seed"] == seed]
        predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected.append(score_files(predictions, references))
    assert [seed["rouge_l"] for seed in report["seeds"]] == [
        summary.rouge_l for summary in expected
    ]
    assert report["rouge_l"] == pytest.approx(
        statistics.mean(summary.rouge_l for summary in expected)
    )
    assert report["rouge_l_std"] == pytest.approx(
        statistics.stdev(summary.rouge_l for summary in expected)
    )
    assert report["exact_match"] == pytest.approx(statistics.mean(s.exact_match for s in expected))
    assert report["num_examples"] == expected[0].num_examples == (10, 7)[index]
    assert report["rouge_l"] > 0 and report["set"] == references.stem and "baselines" not in report


def test_seeds_differ_and_every_row_is_answered_once_per_seed(
    sampled: tuple[Config, RunDirectory],
) -> None:
    rows = answers_of(sampled[1], "one")
    assert len({(row["id"], row["seed"]) for row in rows}) == len(rows) == 20
    by_seed = [[row["answer"] for row in rows if row["seed"] == seed] for seed in (10, 20)]
    assert by_seed[0] != by_seed[1]
    assert set(rows[0]) == {
        "id", "seed", "prompt", "context", "references", "answer", "rouge_l", "exact_match",
    }  # fmt: skip


def test_the_table_has_two_decimals_and_spreads(sampled: tuple[Config, RunDirectory]) -> None:
    _, run = sampled
    lines = (run.eval / "table.md").read_text().splitlines()
    cells = [read_figures(run.eval / name / "answers.jsonl").cell() for name in ("one", "two")]
    assert lines[0] == "| ROUGE-L / exact match, % | one | two |"
    assert lines[2] == f"| student | {cells[0]} | {cells[1]} |"
    assert "±" in cells[0]


def test_other_settings_or_another_export_are_refused_by_name(
    sampled: tuple[Config, RunDirectory], tiny_pair: Pair, tmp_path: Path
) -> None:
    other, run = make_evaluated_run(tmp_path, tiny_pair, evaluate={**SAMPLED, "top_p": 0.5})
    shutil.copytree(sampled[1].eval, run.eval)
    with pytest.raises(MismatchError, match=r"evaluate\.top_p: it was made with 0\.9, now 0\.5"):
        evaluate(other, run)
    config, _ = make_evaluated_run(tmp_path / "b", tiny_pair, evaluate=SAMPLED)
    shutil.rmtree(run.export)
    shutil.copytree(tiny_pair[0], run.export)
    with pytest.raises(MismatchError, match="student model sha256"):
        evaluate(config, run)


def test_missing_pairs_are_answered_as_before_and_baselines_are_added(
    sampled: tuple[Config, RunDirectory], tiny_pair: Pair, tmp_path: Path
) -> None:
    """One actor instead of two, one of two test sets lost, and baselines asked for afterwards."""
    sections = {"evaluate": {**SAMPLED, "baselines": True}, "ray": {"num_actors": 1}}
    config, run = make_evaluated_run(tmp_path, tiny_pair, **sections)
    shutil.copytree(sampled[1].eval, run.eval)
    (run.eval / "two" / "answers.jsonl").unlink()
    kept = (run.eval / "one" / "answers.jsonl").stat().st_mtime_ns
    evaluate(config, run)
    assert (run.eval / "one" / "answers.jsonl").stat().st_mtime_ns == kept
    assert answers_of(run, "two") == answers_of(sampled[1], "two")
    report = json.loads((run.eval / "one" / "report.json").read_text())
    assert set(report["baselines"]) == {"teacher", "student_before"}
    # Teacher and student before training are the same folder here.
    assert report["baselines"]["teacher"] == report["baselines"]["student_before"]
    assert answers_of(run, "one", "answers-teacher.jsonl") != answers_of(run, "one")
    assert len((run.eval / "table.md").read_text().splitlines()) == 5


def test_an_evaluated_run_is_left_alone(
    sampled: tuple[Config, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = sampled
    before = {path: path.read_bytes() for path in run.eval.rglob("*") if path.is_file()}
    evaluate(config, run)
    assert "2 pairs of model and test set are answered already" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in run.eval.rglob("*") if path.is_file()}


def test_without_an_export_distill_is_asked_for(tiny_pair: Pair, tmp_path: Path) -> None:
    config, run = make_evaluated_run(tmp_path, tiny_pair)
    shutil.rmtree(run.export)
    with pytest.raises(MissingInputError, match="pocl-dist distill"):
        evaluate(config, run)
