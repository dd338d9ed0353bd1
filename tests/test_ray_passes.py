"""Passes on real actors that run out of memory, fail or die on rows, or are interrupted."""

from __future__ import annotations

import json
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
from pocl_dist.pipeline import actor_pass, cache_actors
from pocl_dist.pipeline.cache import cache
from pocl_dist.pipeline.difficulty_files import read_quarantine, read_records
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.generate import generate
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from pocl_dist.teacher.cache_files import read_index, read_shards
from tests import caching, fixtures_models
from tests.caching import assert_same_content, content, planned, write_cache_config
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
    ray.cloudpickle.register_pickle_by_value(sys.modules[caching.__name__])
    monkeypatch.setattr(actor_pass, "ModelWorker", Troubled)
    monkeypatch.setattr(cache_actors, "CacheWorker", caching.Troubled)
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
    generate(config, run)
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


def test_batches_that_do_not_fit_are_halved_counted_and_give_the_same(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    trouble: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trouble.setattr(Troubled, "max_rows", 2)
    config, run = make_all(tmp_path, tiny_pair)
    measure(config, run)
    assert "3 batches did not fit into memory and were halved" in capsys.readouterr().err
    generate(config, run)
    evaluate(config, run)
    assert read_json(run.difficulty / "summary.json")["num_halved_batches"] == 3
    assert read_json(run.generated / "train.provenance.json")["num_halved_batches"] == 3
    assert read_json(run.eval / "test" / "report.json")["num_halved_batches"] == 4
    expected, found = records_of(undisturbed), records_of(run)
    for name, record in found.items():
        other = expected.pop(name)
        assert (record.answer, record.rouge_l) == (other.answer, other.rouge_l)
        assert record.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-5)
    assert not expected
    for name in ("generated/train.jsonl", "eval/test/answers.jsonl"):  # greedy, and sampled
        assert files_of(run)[name] == files_of(undisturbed)[name]


def test_rows_that_fail_are_listed_and_left_out_by_every_step(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    trouble: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trouble.setattr(Troubled, "failing", frozenset({"row-003"}))
    config, run = make_all(tmp_path, tiny_pair)
    measure(config, run)
    (failure,) = read_quarantine(run.difficulty).values()
    reason = "IndexError: index out of range in self"
    assert (failure.example_id, failure.cause, failure.reason) == ("row-003", "exception", reason)
    expected = {name: r for name, r in records_of(undisturbed).items() if name != "row-003"}
    found = records_of(run)
    assert {name: r.answer for name, r in found.items()} == {
        name: r.answer for name, r in expected.items()
    }
    assert read_json(run.difficulty / "summary.json")["num_quarantined_by_cause"] == {
        "exception": 1
    }
    assert "row-003" not in make_plan(config, run).ranking
    generate(config, run)
    unusable = read_json_lines(run.generated / "unusable.jsonl")
    assert {"example_id": "row-003", "reason": reason} in unusable
    evaluate(config, run)
    scores = {(row["id"], row["seed"]): row for row in answers_of(run)}
    assert len(scores) == 16
    for row in answers_of(undisturbed):
        other = scores[row["id"], row["seed"]]
        if row["id"] == "row-003":
            assert (other["answer"], other["rouge_l"], other["failure"]) == ("", 0.0, reason)
        else:
            assert other == row
    assert read_json(run.eval / "test" / "report.json")["num_failed_answers"] == 2
    assert "2 rows could not be answered by student and score 0" in capsys.readouterr().err
    measure(config, run)
    assert "12 rows are measured already" in capsys.readouterr().out


def test_more_failing_rows_than_the_budget_end_the_step(
    tiny_pair: Pair, tmp_path: Path, trouble: pytest.MonkeyPatch
) -> None:
    trouble.setattr(Troubled, "failing", frozenset({"row-003", "row-005", "row-006"}))
    config, run = make_all(tmp_path, tiny_pair, data={"max_bad_rows": 2})
    with pytest.raises(DataError, match=r"3 rows cannot be worked on.*data\.max_bad_rows is 2"):
        measure(config, run)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("place", ["pass.before_save", "pass.after_shard"])
def test_an_evaluation_that_ends_in_the_middle_goes_on_from_its_shards(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    nth: int,
) -> None:
    config, run = make_all(tmp_path, tiny_pair)
    monkeypatch.setenv(failpoints.VARIABLE, f"{place}=enospc@{nth}")
    with pytest.raises(OSError):
        evaluate(config, run)
    monkeypatch.delenv(failpoints.VARIABLE)
    shards = sorted((run.eval / "test" / "shards").rglob("shard-*.json"))
    assert len(shards) == (nth if place == "pass.after_shard" else nth - 1)
    assert not (run.eval / "test" / "answers.jsonl").exists()
    if shards:  # one is damaged meanwhile, and answered again
        shards[0].write_bytes(shards[0].read_bytes()[:-5])
    evaluate(config, run)
    assert not (run.eval / "test" / "shards").exists()
    for name in ("answers.jsonl", "report.json"):
        assert (run.eval / "test" / name).read_bytes() == (
            undisturbed.eval / "test" / name
        ).read_bytes()


def test_a_damaged_shard_is_measured_and_generated_again(
    undisturbed: RunDirectory,
    tiny_pair: Pair,
    tmp_path: Path,
    ray_of_module: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run = make_all(tmp_path, tiny_pair)
    shutil.rmtree(run.root)
    shutil.copytree(undisturbed.root, run.root)
    same = {"data": undisturbed.root.parent / "train.jsonl"}["data"]
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": str(same)})})
    (run.generated / "train.jsonl").unlink()
    victims = [run.difficulty / "shard-00001.parquet", run.generated / "shard-00002.json"]
    for victim in victims:
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    measure(config, run)
    generate(config, run)
    warnings = capsys.readouterr().err
    assert all(f"{victim}: content changed (sha256 differs)" in warnings for victim in victims)
    assert files_of(run) == files_of(undisturbed)


def test_a_teacher_that_runs_out_of_memory_caches_the_same_and_a_failing_row_stops_the_run(
    tiny_pair: Pair, tmp_path: Path, trouble: pytest.MonkeyPatch
) -> None:
    rows = {"limit": 8}
    path = write_cache_config(tmp_path / "a", tiny_pair, data=rows)
    trouble.undo()
    config, whole = planned(path)
    cache(config, whole)
    trouble.setattr(cache_actors, "CacheWorker", caching.Troubled)
    path = write_cache_config(tmp_path / "b", tiny_pair, data=rows)
    config, run = planned(path)
    trouble.setattr(caching.Troubled, "failing", frozenset({"row-005"}))
    with pytest.raises(DataError, match=r"could not answer 1 rows .*'row-005'\): IndexError") as e:
        cache(config, run)
    assert "teacher.source: online" in str(e.value)
    assert set(read_index(read_shards(run.teacher_cache))) == set(content(whole)) - {"row-005"}
    assert not (run.teacher_cache / "summary.json").exists()
    trouble.setattr(caching.Troubled, "failing", frozenset())
    cache(config, run)
    assert_same_content(whole, run, is_exact=False)
    assert not (run.teacher_cache / "quarantine.jsonl").exists()
    assert json.loads((run.teacher_cache / "summary.json").read_text())["num_halved_batches"] > 0


@pytest.mark.slow
def test_rows_that_kill_their_actor_are_found_and_the_other_rows_come_out_as_always(
    undisturbed: RunDirectory, tiny_pair: Pair, tmp_path: Path, trouble: pytest.MonkeyPatch
) -> None:
    trouble.setattr(Troubled, "deadly", frozenset({"row-003"}))
    config, run = make_all(tmp_path, tiny_pair)
    measure(config, run)
    (failure,) = read_quarantine(run.difficulty).values()
    assert (failure.example_id, failure.cause) == ("row-003", "lost")
    found, expected = records_of(run), records_of(undisturbed)
    del expected["row-003"]
    assert found.keys() == expected.keys()
    for name, record in found.items():
        assert (record.answer, record.rouge_l) == (expected[name].answer, expected[name].rouge_l)
        assert record.cross_entropy == pytest.approx(expected[name].cross_entropy, rel=1e-5)
    evaluate(config, run)
    failed = [row for row in answers_of(run) if "failure" in row]
    assert [row["id"] for row in failed] == ["row-003"] * 2
    others = [row for row in answers_of(undisturbed) if row["id"] != "row-003"]
    assert [row for row in answers_of(run) if "failure" not in row] == others
