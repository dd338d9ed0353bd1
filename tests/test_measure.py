"""measure on real actors: the same bits however the work is shared out, interrupted or lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from pocl_dist.config import Config
from pocl_dist.difficulty.work import make_batches, make_shards
from pocl_dist.difficulty.worker import ModelWorker, WorkerSettings
from pocl_dist.errors import MismatchError, MissingInputError, StoppedError
from pocl_dist.metrics import rouge_l
from pocl_dist.models.generation import Sampling, generate_answers
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline import actor_pass
from pocl_dist.pipeline.difficulty_files import read_quarantine, read_records
from pocl_dist.pipeline.inputs import make_encoder, read_train
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord, EncodedExample
from tests import fixtures_models
from tests.fixtures_models import DiesOnce, make_run, write_varied_rows
from tests.fixtures_models import ray_of_module as ray_of_module
from tests.tiny import WORDS, write_llama

Pair = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def measured(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> tuple[Config, RunDirectory]:
    """Returns a run that two actors have measured, and its config."""
    teacher, student, _ = tiny_pair
    folder = tmp_path_factory.mktemp("measured")
    config, run = make_run(folder, student, write_varied_rows(folder / "train.jsonl"), teacher)
    measure(config, run)
    return config, run


def records_of(run: RunDirectory) -> dict[str, DifficultyRecord]:
    return {record.example_id: record for record in read_records(run.difficulty)}


def one_by_one(config: Config, student: Path) -> list[DifficultyRecord]:
    """The same scores without batches, padding, actors or our cross-entropy: row by row."""
    source = ModelFolder(student, str(student))
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    encoder = make_encoder(config, tokenizer)
    records = []
    for example in read_train(config).examples:
        encoded = encoder.encode(example)
        sampling = Sampling(config.generation.max_new_tokens)
        answer = generate_answers(model, tokenizer, [encoded.prompt_ids], sampling)[0]
        ids_BT = torch.tensor([encoded.token_ids])
        with torch.no_grad():
            logprobs_TV = model(ids_BT).logits[0, :-1, : len(tokenizer)].double().log_softmax(-1)
        start = encoded.num_prompt_tokens
        losses_N = [-float(logprobs_TV[t - 1, ids_BT[0, t]]) for t in range(start, ids_BT.shape[1])]
        cross_entropy = sum(losses_N) / len(losses_N)
        score = rouge_l(answer, example.references[:1])
        records.append(
            DifficultyRecord(example.example_id, score, cross_entropy, len(losses_N), answer)
        )
    return records


def test_scores_are_those_of_row_after_row(
    measured: tuple[Config, RunDirectory], tiny_pair: Pair
) -> None:
    config, run = measured
    found = records_of(run)
    for expected in one_by_one(config, tiny_pair[1]):
        record = found.pop(expected.example_id)
        assert record.cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-5)
        assert (record.answer, record.rouge_l) == (expected.answer, expected.rouge_l)
        assert record.num_response_tokens == expected.num_response_tokens
    assert not found
    assert len({record.rouge_l for record in records_of(run).values()}) > 1


def test_the_summary_counts_and_averages(measured: tuple[Config, RunDirectory]) -> None:
    _, run = measured
    summary = json.loads((run.difficulty / "summary.json").read_text())
    records = records_of(run).values()
    assert summary["num_examples"] == 24 and summary["num_quarantined"] == 0
    assert summary["mean_cross_entropy"] == pytest.approx(
        sum(r.cross_entropy for r in records) / 24
    )
    assert set(summary["tie_shares"]) == {"rouge_l", "cross_entropy"}


def test_a_measured_run_is_left_alone(
    measured: tuple[Config, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = measured
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    started = time.monotonic()
    measure(config, run)
    assert time.monotonic() - started < 1
    assert "24 rows are measured already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        (
            "generation",
            {"max_new_tokens": 5},
            r"generation\.max_new_tokens: it was made with 6, now 5",
        ),
        ("generation", {"batch_size": 4}, r"generation\.batch_size"),
        ("data", {"max_prompt_tokens": 40}, r"data\.max_prompt_tokens"),
        ("data", {"limit": 20}, r"data\.limit"),
        ("ray", {"cpus_per_actor": 2}, r"ray\.cpus_per_actor"),
    ],
)
def test_scores_made_from_other_keys_are_refused_by_name(
    measured: tuple[Config, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    section: str,
    value: dict,
    key: str,
) -> None:
    teacher, student, _ = tiny_pair
    train = write_varied_rows(tmp_path / "train.jsonl")
    config, _ = make_run(tmp_path, student, train, teacher, **{section: value})
    with pytest.raises(MismatchError, match=key):
        measure(config, measured[1])


def test_another_student_or_other_rows_are_refused(
    measured: tuple[Config, RunDirectory], tiny_pair: Pair, tmp_path: Path
) -> None:
    teacher, student, _ = tiny_pair
    train = write_varied_rows(tmp_path / "train.jsonl")
    other = write_llama(tmp_path / "other", hidden=16, layers=1, seed=3)
    config, _ = make_run(tmp_path, other, train, teacher)
    with pytest.raises(MismatchError, match=r"models\.student model sha256"):
        measure(config, measured[1])
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(train.read_text().splitlines()[:20]) + "\n")
    config, _ = make_run(tmp_path, student, shorter, teacher)
    with pytest.raises(MismatchError, match=r"data\.train sha256"):
        measure(config, measured[1])


def test_a_student_that_is_not_made_yet_is_asked_for(tiny_pair: Pair, tmp_path: Path) -> None:
    teacher, student, train = tiny_pair
    models = {"student": {"init_layers": [0]}}
    config, run = make_run(tmp_path, student, train, teacher, models=models)
    with pytest.raises(MissingInputError, match="init-student"):
        measure(config, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_pass_at_once(
    tiny_pair: Pair, tmp_path: Path, ray_of_module: None, number: signal.Signals
) -> None:
    teacher, student, _ = tiny_pair
    config, run = make_run(tmp_path, student, write_varied_rows(tmp_path / "train.jsonl"), teacher)
    before = signal.getsignal(number)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(StoppedError, match="the same command goes on"):
        measure(config, run)
    assert not timer.is_alive() and signal.getsignal(number) is before


def test_the_stop_file_ends_the_pass(tiny_pair: Pair, tmp_path: Path, ray_of_module: None) -> None:
    teacher, student, _ = tiny_pair
    config, run = make_run(tmp_path, student, write_varied_rows(tmp_path / "train.jsonl"), teacher)
    run.stop_file.parent.mkdir(parents=True)
    run.stop_file.touch()
    with pytest.raises(StoppedError):
        measure(config, run)
    assert not list(run.difficulty.glob("shard-*"))


def test_an_interrupted_pass_goes_on_with_what_is_missing_or_damaged(
    measured: tuple[Config, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of two shards is there, by two actors; one makes the rest, in shards of another size."""
    teacher, student, _ = tiny_pair
    train = write_varied_rows(tmp_path / "train.jsonl")
    config, run = make_run(
        tmp_path, student, train, teacher, ray={"num_actors": 1, "shard_size": 9}
    )
    shutil.copytree(measured[1].difficulty, run.difficulty)
    (run.difficulty / "summary.json").unlink()
    (run.difficulty / "shard-00000.parquet.seal").unlink()  # the writer was killed before it
    damaged = run.difficulty / "shard-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = (run.difficulty / "shard-00002.parquet").stat().st_mtime_ns
    measure(config, run)
    assert (run.difficulty / "shard-00002.parquet").stat().st_mtime_ns == kept
    assert sorted(path.name for path in run.difficulty.glob("shard-*.parquet")) == [
        "shard-00000.parquet",  # of two batches
        "shard-00002.parquet",
    ]
    assert records_of(run) == records_of(measured[1])  # floats to the bit
    assert (run.difficulty / "summary.json").exists()
    assert f"{damaged}: " in (warning := capsys.readouterr().err) and "computed again" in warning


def test_one_actor_that_is_killed_gives_the_same_scores_as_two(
    measured: tuple[Config, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, _ = tiny_pair
    train = write_varied_rows(tmp_path / "train.jsonl")
    config, run = make_run(
        tmp_path, student, train, teacher, ray={"num_actors": 1, "shard_size": 16}
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[fixtures_models.__name__])
    monkeypatch.setattr(DiesOnce, "marker", tmp_path / "died")
    monkeypatch.setattr(actor_pass, "ModelWorker", DiesOnce)
    measure(config, run)
    assert DiesOnce.marker.exists()
    assert "shard-00000: its actor died, attempt 1 of 3; trying again" in capsys.readouterr().out
    assert records_of(run) == records_of(measured[1])


def test_rows_without_a_finite_score_are_quarantined(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_of_module: None
) -> None:
    """The student's embedding of one word is NaN; its head is another matrix."""
    teacher = tiny_pair[0]
    train = write_varied_rows(tmp_path / "train.jsonl")
    student = write_llama(tmp_path / "student", hidden=16, layers=2, seed=2, is_tied=False)
    weights = load_file(student / "model.safetensors")
    token = load_tokenizer(ModelFolder(student, "student"))(" " + WORDS[2])["input_ids"][-1]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    config, run = make_run(tmp_path, student, train, teacher)
    measure(config, run)
    reasons = read_quarantine(run.difficulty)
    summary = json.loads((run.difficulty / "summary.json").read_text())
    assert 0 < len(reasons) < 24 and {row.reason for row in reasons.values()} == {
        "cross_entropy is nan"
    }
    assert summary["num_quarantined"] == len(reasons) == 24 - summary["num_examples"]
    assert f"{len(reasons)} rows have no finite score" in capsys.readouterr().err
    ranking = make_plan(config, run).ranking
    assert set(ranking) == {f"row-{index:03d}" for index in range(24)} - set(reasons)
    measure(config, run)
    assert f"{24} rows are measured already" in capsys.readouterr().out


def test_a_worker_refuses_a_model_that_the_driver_did_not_see(tiny_pair: Pair) -> None:
    settings = WorkerSettings(ModelFolder(tiny_pair[1], "student"), "another", Sampling(4), 1)
    with pytest.raises(MismatchError, match="not those that the driver found"):
        ModelWorker(settings).start()


def test_batches_and_shard_names_depend_on_the_rows_alone() -> None:
    rows = [
        EncodedExample(f"r{i}", tuple(range(2 + i % 5)), 1 + i % 5, False, False) for i in range(23)
    ]
    references = {row.example_id: ("x",) for row in rows}
    batches = make_batches(rows, references, 4)
    assert batches == make_batches(reversed(rows), references, 4)
    assert [len(batch.examples) for batch in batches] == [4, 4, 4, 4, 4, 3]
    lengths = [row.num_prompt_tokens for batch in batches for row in batch.examples]
    assert lengths == sorted(lengths)
    for shard_size, names in ((1, [5, 4, 3, 2, 1, 0]), (5, [4, 2, 0]), (8, [4, 2, 0]), (100, [0])):
        shards = make_shards(batches, shard_size)
        assert [shard.name for shard in shards] == [f"shard-{number:05d}" for number in names]
        together = sorted(
            (batch for shard in shards for batch in shard.batches), key=lambda b: b.index
        )
        assert together == list(batches)
