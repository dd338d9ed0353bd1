"""plan: a pure function of scores, rows and config, and everything it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.curriculum.stages import order
from pocl_dist.data.columns import number_array, text_array, write_columns
from pocl_dist.errors import DataError, MismatchError, MissingInputError, RefusedError
from pocl_dist.files import JSONValue, atomic_write_json, digest_of
from pocl_dist.pipeline import plan_files
from pocl_dist.pipeline.difficulty_files import config_inputs, not_finite, write_difficulty
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.plan_files import RankingFile, plan_digest, ranked_rows, read_plan
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from pocl_dist.shard_files import write_shard
from tests.fixtures_models import make_run
from tests.ranked import as_json, ranked, scores_digest
from tests.tiny import write_rows

NUM_ROWS = 23


def scores(num_rows: int = NUM_ROWS) -> list[DifficultyRecord]:
    generator = random.Random(5)
    return [
        DifficultyRecord(f"row-{index:03d}", generator.random(), generator.random(), 3, "answer")
        for index in range(num_rows)
    ]


def planned_run(
    folder: Path, records: Sequence[DifficultyRecord] | None, **sections: object
) -> tuple[Config, RunDirectory]:
    """Returns a run whose difficulty files, in two shards, are as measure leaves them."""
    train = write_rows(folder / "train.jsonl", NUM_ROWS)
    config, run = make_run(folder, folder / "student", train, folder / "teacher", **sections)
    if records is not None:
        inputs = config_inputs(config, read_train(config)) | {"models.student model sha256": "0"}
        atomic_write_json(run.difficulty / "inputs.json", inputs)
        half = len(records) // 2
        write_difficulty(run.difficulty, "shard-00000", records[:half], 0)
        write_difficulty(run.difficulty, "shard-00004", records[half:], 0)
    return config, run


def test_the_plan_is_the_fused_ranking_and_its_stages(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    plan = make_plan(config, run)
    expected = ranked(scores(), 60)
    assert plan.ranking == tuple(example.example_id for example in expected)
    assert [(s.num_examples, s.num_steps) for s in plan.stages] == [(11, 3), (23, 6)]
    written = json.loads(run.plan.read_text())
    assert written["ranking"] == list(plan.ranking)
    assert set(written["stages"][0]) >= {
        "index",
        "num_examples",
        "temperature",
        "kd_ratio",
        "epochs",
        "num_steps",
    }
    table = pq.read_table(run.difficulty / "ranking.parquet").to_pylist()
    assert table == as_json(expected)
    assert written["inputs"]["difficulty sha256"] == scores_digest(scores())
    assert read_plan(run.plan) == plan


def test_planning_again_changes_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = planned_run(tmp_path, scores())
    make_plan(config, run)
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in run.root.rglob("*")
        if path.is_file()
    }
    make_plan(config, run)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    assert "2.96 visits per row, 9 steps" in capsys.readouterr().out


@pytest.mark.parametrize("ordering", ["reversed", "shuffled"])
def test_the_controls_reorder_the_ranking(tmp_path: Path, ordering: str) -> None:
    config, run = planned_run(tmp_path, scores(), curriculum={"ordering": ordering})
    ids = [example.example_id for example in ranked(scores(), 60)]
    if ordering == "shuffled":  # in no relation to the scores
        ids = [f"row-{index:03d}" for index in range(NUM_ROWS)]
    expected = [ids[place] for place in order(NUM_ROWS, ordering, config.seed)]
    assert list(make_plan(config, run).ranking) == expected
    assert ordering == "shuffled" or expected == ids[::-1]


@pytest.mark.parametrize("curriculum", [{"num_stages": 1}, {"ordering": "shuffled"}])
def test_without_an_order_no_scores_are_needed(
    tmp_path: Path, curriculum: dict[str, object]
) -> None:
    config, run = planned_run(tmp_path, None, curriculum=curriculum)
    assert not needs_difficulty(config)
    plan = make_plan(config, run)
    assert sorted(plan.ranking) == [f"row-{index:03d}" for index in range(NUM_ROWS)]
    if "num_stages" in curriculum:
        assert list(plan.ranking) == sorted(plan.ranking)
        assert (plan.stages[0].temperature, plan.stages[0].kd_ratio) == (1.0, 1.0)


def test_without_a_teacher_all_stages_are_cross_entropy_alone(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", NUM_ROWS)
    config, run = make_run(
        tmp_path, tmp_path / "student", train, None, curriculum={"ordering": "shuffled"}
    )
    assert {(stage.temperature, stage.kd_ratio) for stage in make_plan(config, run).stages} == {
        (1.0, 0.0)
    }


def test_missing_scores_ask_for_measure(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, None)
    assert needs_difficulty(config)
    with pytest.raises(MissingInputError, match="pocl-dist measure"):
        make_plan(config, run)


def test_rows_without_scores_are_counted_and_named(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores()[7:])
    with pytest.raises(
        DataError,
        match=r"7 rows .* not scored \(first: row-000, row-001, row-002, row-003, row-004\)",
    ):
        make_plan(config, run)


def test_scores_without_rows_are_counted_and_named(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores(NUM_ROWS + 2))
    with pytest.raises(
        DataError, match=r"2 scored rows are not in data\.train \(first: row-023, row-024\)"
    ):
        make_plan(config, run)


def test_a_score_that_stands_twice_is_refused(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    write_difficulty(run.difficulty, "shard-00009", scores()[:1], 0)
    with pytest.raises(
        DataError, match=r"shard-00009\.parquet: row 'row-000' is in another shard too"
    ):
        make_plan(config, run)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    (run.difficulty / "shard-00004.parquet").write_bytes(b"torn")
    with pytest.raises(MismatchError, match=r"shard-00004\.parquet: 4 bytes, expected .*measure"):
        make_plan(config, run)


def test_a_sealed_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    write_shard(run.difficulty / "shard-00009.parquet", b"torn")
    with pytest.raises(DataError, match=r"shard-00009\.parquet: no difficulty scores"):
        make_plan(config, run)


def test_quarantined_rows_are_left_out_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = scores()
    config, run = planned_run(tmp_path, records[1:])
    bad = not_finite(replace(records[0], cross_entropy=float("nan")))
    Quarantine(run.difficulty / "quarantine.jsonl", 1).add([bad])
    plan = make_plan(config, run)
    assert "row-000" not in plan.ranking
    assert plan.stages[-1].num_examples == NUM_ROWS - 1
    assert "1 rows have no finite score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("curriculum", {"num_stages": 3}, r"curriculum\.num_stages: it was made with 2, now 3"),
        ("curriculum", {"temperature": 1.5}, r"curriculum\.temperature"),
        ("curriculum", {"rrf_k": 10.0}, r"curriculum\.rrf_k"),
        (
            "engine",
            {"global_batch_size": 4},
            r"engine\.global_batch_size: it was made with 8, now 4",
        ),
    ],
)
def test_a_plan_made_from_other_keys_is_refused_by_name(
    tmp_path: Path, section: str, value: dict[str, object], key: str
) -> None:
    config, run = planned_run(tmp_path, scores())
    make_plan(config, run)
    other, _ = planned_run(tmp_path, None, **{section: value})
    with pytest.raises(MismatchError, match=key):
        make_plan(other, run)


def test_other_scores_are_refused(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    make_plan(config, run)
    planned_run(tmp_path, [replace(record, rouge_l=record.rouge_l / 2) for record in scores()])
    with pytest.raises(MismatchError, match="difficulty sha256"):
        make_plan(config, run)


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("data", {"template": "alpaca"}, r"data\.template: it was made with 'short', now 'alpaca'"),
        ("generation", {"max_new_tokens": 9}, r"generation\.max_new_tokens"),
        ("data", {"limit": 20}, r"data\.limit"),
    ],
)
def test_scores_made_from_other_keys_are_refused_by_name(
    tmp_path: Path, section: str, value: dict[str, object], key: str
) -> None:
    planned_run(tmp_path, scores())
    other, run = planned_run(tmp_path, None, **{section: value})
    with pytest.raises(MismatchError, match=key):
        make_plan(other, run)


def test_a_changed_plan_is_refused_when_read(tmp_path: Path) -> None:
    config, run = planned_run(tmp_path, scores())
    make_plan(config, run)
    value = json.loads(run.plan.read_text())
    value["stages"][0]["num_steps"] += 1
    run.plan.write_text(json.dumps(value))
    for read in (lambda: read_plan(run.plan), lambda: make_plan(config, run)):
        with pytest.raises(MismatchError, match=r"plan\.json was changed after it was made"):
            read()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"digest": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(MismatchError, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")


def test_a_long_ranking_lies_in_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = planned_run(tmp_path, scores())
    in_json = make_plan(config, run)
    run.plan.unlink()
    monkeypatch.setattr(plan_files, "MAX_RANKING_IN_JSON", NUM_ROWS - 1)
    plan, rows = make_plan(config, run), read_train(config)
    value = json.loads(run.plan.read_text())
    assert "ranking" not in value
    assert read_plan(run.plan) == plan == make_plan(config, run) == in_json
    assert plan_digest(read_plan(run.plan)) == plan_digest(in_json)
    places = ranked_rows(read_plan(run.plan), rows)
    assert [rows.examples[place].example_id for place in places] == list(plan.ranking)
    assert places.tolist() == ranked_rows(in_json, rows).tolist()
    with pytest.raises(MismatchError, match="the plan was made for other rows"):
        ranked_rows(read_plan(run.plan), replace(rows, digest="0"))
    file = run.root / value["ranking_file"]
    earlier = tmp_path / "earlier.parquet"
    pq.write_table(pq.read_table(file).select(["example_id"]), earlier)
    with pytest.raises(MismatchError, match=r"earlier\.parquet was made by an earlier version"):
        RankingFile(earlier, NUM_ROWS, rows.digest).rows()
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(MismatchError, match=r"plan-ranking\.parquet was changed"):
        read_plan(run.plan)


def test_a_ranking_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    path, num_rows = tmp_path / "plan-ranking.parquet", 16 * 65_536
    write_columns(
        path,
        num_rows,
        lambda part: {
            "example_id": text_array(
                [f"{row * 7919 % num_rows:016x}" for row in range(part.start, part.stop)]
            ),
            "row": number_array(np.arange(part.start, part.stop)),
        },
    )
    ranking, before = RankingFile(path, num_rows, "digest"), pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in ranking.parts()]
    assert len(held) == 16
    assert max(held) - min(held) < 4 * 2**20, "a row group takes 1.1 MiB, whatever came before"


def test_a_ranking_file_may_not_leave_the_folder(tmp_path: Path) -> None:
    value: dict[str, JSONValue] = {
        "stages": [],
        "inputs": {},
        "ranking_file": "../other.parquet",
        "ranking_sha256": "",
    }
    atomic_write_json(tmp_path / "plan.json", {**value, "digest": digest_of(value)})
    with pytest.raises(RefusedError, match=r"ranking_file: the name .* leaves"):
        read_plan(tmp_path / "plan.json")


def test_a_stage_smaller_than_a_batch_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = planned_run(tmp_path, scores(), engine={"global_batch_size": 16})
    make_plan(config, run)
    assert "stage 1 has 11 rows, less than engine.global_batch_size 16" in capsys.readouterr().err


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    planned_run(tmp_path, scores())
    code = (
        "import sys; from pathlib import Path; from pocl_dist.config import load_config;"
        "from pocl_dist.pipeline.plan import make_plan;"
        "from pocl_dist.pipeline.run_directory import RunDirectory;"
        "config = load_config([sys.argv[1]]);"
        " make_plan(config, RunDirectory(Path(config.run_dir)));"
        "import pocl_dist.pipeline.measure, pocl_dist.pipeline.evaluate;"
        "print({'torch', 'transformers', 'ray', 'deepspeed', 'datasets', 'pandas'}"
        " & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
