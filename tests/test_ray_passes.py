"""Passes on real actors that run out of memory, fail or die on rows, or are interrupted."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray

from pocl_dist import failpoints
from pocl_dist.config import Config
from pocl_dist.errors import DataError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.pipeline import actor_pass
from pocl_dist.pipeline.difficulty_files import read_quarantine, read_records
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord, RowFailure
from tests import fixtures_models
from tests.fixtures_models import Troubled, make_run, write_varied_rows
from tests.fixtures_models import ray_of_module as ray_of_module

Pair = tuple[Path, Path, Path]
SAMPLED = {"do_sample": True, "seeds": [10, 20], "temperature": 0.7, "top_p": 0.9}


@pytest.fixture(autouse=True)
def no_failpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_num_passed", Counter())


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch, ray_of_module: None) -> pytest.MonkeyPatch:
    """Returns what sets the attributes of the workers, which are Troubled here."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[fixtures_models.__name__])
    monkeypatch.setattr(actor_pass, "ModelWorker", Troubled)
    return monkeypatch


def make_all(folder: Path, pair: Pair, **sections: object) -> tuple[Config, RunDirectory]:
    """Returns a run of 12 rows in batches of 4, with a test set and an export."""
    folder.mkdir(exist_ok=True)
    train = write_varied_rows(folder / "train.jsonl", 12)
    data = {"eval": [str(write_varied_rows(folder / "test.jsonl", 8))], **sections.pop("data", {})}  # type: ignore[dict-item]
    merged = {"generation": {"batch_size": 4}, "evaluate": SAMPLED, **sections}
    ray_section = {"num_actors": 1, "shard_size": 4}
    config, run = make_run(folder, pair[1], train, pair[0], data=data, ray=ray_section, **merged)
    shutil.copytree(pair[1], run.export)
    return config, run


@pytest.fixture(scope="module")
def undisturbed(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> RunDirectory:
    config, run = make_all(tmp_path_factory.mktemp("undisturbed"), tiny_pair)
    measure(config, run)
    evaluate(config, run)
    return run


def records_of(run: RunDirectory) -> dict[str, DifficultyRecord]:
    return {record.example_id: record for record in read_records(run.difficulty)}


def answers_of(run: RunDirectory) -> list[dict]:
    return [dict(row) for row in read_json_lines(run.eval / "test" / "answers.jsonl")]


def files_of(run: RunDirectory) -> dict[str, bytes]:
    """Returns all that the passes wrote, but for times and paths."""
    files = [*run.difficulty.glob("shard-*"), *run.generated.glob("shard-*")]
    files += [*run.generated.glob("*.jsonl"), *(run.eval / "test").glob("*.jsonl")]
    return {str(path.relative_to(run.root)): path.read_bytes() for path in files}


def assert_same_scores(run: RunDirectory, undisturbed: RunDirectory, without: str) -> None:
    """Compares answers exactly; a product of other height may round a cross-entropy otherwise."""
    found, expected = records_of(run), records_of(undisturbed)
    del expected[without]
    assert found.keys() == expected.keys()
    for name, record in found.items():
        assert (record.answer, record.rouge_l) == (expected[name].answer, expected[name].rouge_l)
        assert record.cross_entropy == pytest.approx(expected[name].cross_entropy, rel=1e-5)


def assert_same_answers(run: RunDirectory, undisturbed: RunDirectory, without: str) -> None:
    """Compares evaluations: a row that failed has an empty answer, scores 0 and says why."""
    expected = answers_of(undisturbed)
    for row, other in zip(answers_of(run), expected, strict=True):
        if row["id"] == without:
            assert row.pop("failure")
            other.update(answer="", rouge_l=0.0, exact_match=0.0)
        assert row == other
    assert read_json(run.eval / "test" / "report.json")["num_failed_answers"] == 2


def test_with_too_little_memory_and_a_row_that_fails_all_other_rows_come_out_as_always(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    trouble: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Batches of 4, memory for 2."""
    trouble.setattr(Troubled, "max_rows", 2)
    trouble.setattr(Troubled, "failing", frozenset({"row-003"}))
    config, run = make_all(tmp_path, tiny_pair)
    measure(config, run)
    assert "3 batches did not fit into memory and were halved" in capsys.readouterr().err
    (failure,) = read_quarantine(run.difficulty).values()
    reason = "IndexError: index out of range in self"
    assert (failure.example_id, failure.cause, failure.reason) == ("row-003", "exception", reason)
    summary = read_json(run.difficulty / "summary.json")
    assert summary["num_quarantined_by_cause"] == {"exception": 1}
    assert summary["num_halved_batches"] == 3
    assert_same_scores(run, undisturbed, without="row-003")
    assert "row-003" not in make_plan(config, run).ranking
    measure(config, run)  # the row is not tried again
    assert "12 rows are measured already" in capsys.readouterr().out


def test_an_evaluation_that_ends_in_the_middle_goes_on_from_its_shards(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    trouble: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sampled, with memory for 2 of 4 rows and a row that fails; the disk is full after 3 of 4."""
    trouble.setattr(Troubled, "max_rows", 2)
    trouble.setattr(Troubled, "failing", frozenset({"row-003"}))
    config, run = make_all(tmp_path, tiny_pair)
    trouble.setenv(failpoints.VARIABLE, "pass.after_shard=enospc@3")
    with pytest.raises(OSError):
        evaluate(config, run)
    shards = sorted((run.eval / "test" / "shards").rglob("shard-*.json"))
    assert len(shards) == 3 and not (run.eval / "test" / "answers.jsonl").exists()
    shards[0].write_bytes(shards[0].read_bytes()[:-5])  # damaged meanwhile: answered again
    trouble.setenv(failpoints.VARIABLE, "pass.before_save=enospc@6")  # three and two are saved
    evaluate(config, run)
    assert f"{shards[0]}: " in (warnings := capsys.readouterr().err)
    assert "2 rows could not be answered by student and score 0" in warnings
    assert not (run.eval / "test" / "shards").exists()
    assert_same_answers(run, undisturbed, without="row-003")
    assert read_json(run.eval / "test" / "report.json")["num_halved_batches"] == 4


def test_more_failing_rows_than_the_budget_end_the_step(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 2)
    quarantine.add([])
    assert not quarantine.path.exists()
    quarantine.add([RowFailure("a", "not finite", "x"), RowFailure("b", "memory", "y")])
    quarantine.add([RowFailure("b", "lost", "z")])
    assert {name: row.cause for name, row in quarantine.read().items()} == {
        "a": "not finite",
        "b": "lost",
    }
    assert quarantine.unworkable() == {"b"}
    with pytest.raises(DataError, match=r"3 rows .* last \('c'\): w \(data\.max_bad_rows is 2"):
        quarantine.add([RowFailure("c", "exception", "w")])
    assert set(quarantine.read()) == {"a", "b", "c"}
    quarantine.path.write_text('{"example_id": "a"}\n')
    with pytest.raises(DataError, match="is no list of rows"):
        quarantine.read()


@pytest.mark.slow
def test_rows_that_kill_their_actor_are_found_and_the_other_rows_come_out_as_always(
    undisturbed: RunDirectory, tiny_pair: Pair, tmp_path: Path, trouble: pytest.MonkeyPatch
) -> None:
    trouble.setattr(Troubled, "deadly", frozenset({"row-003"}))
    config, run = make_all(tmp_path, tiny_pair)
    measure(config, run)
    (failure,) = read_quarantine(run.difficulty).values()
    assert (failure.example_id, failure.cause) == ("row-003", "lost")
    assert_same_scores(run, undisturbed, without="row-003")
    evaluate(config, run)
    assert_same_answers(run, undisturbed, without="row-003")
