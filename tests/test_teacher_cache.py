"""The cache pass on real actors and ranks: the same values however it is shared or interrupted."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pocl_dist.config import RayConfig, load_config
from pocl_dist.distributed import ray_session as session
from pocl_dist.distributed.ray_pool import actor_shape
from pocl_dist.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingInputError,
    StoppedError,
    StorageError,
)
from pocl_dist.files import read_json
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline import cache as cache_step
from pocl_dist.pipeline import cache_actors
from pocl_dist.pipeline.cache import cache, missing_shards, prepare, remove_damage
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import EncodedExample, LMHead, TeacherTopK
from pocl_dist.teacher.cache import read_head
from pocl_dist.teacher.cache_files import read_shards
from pocl_dist.teacher.cache_work import make_cache_shards
from pocl_dist.teacher.cache_worker import check_placed
from pocl_dist.teacher.top_k import cut_to_top_k, spread_logprobs
from tests import caching
from tests.caching import (
    TEMPERATURES,
    Pair,
    assert_same_content,
    cached,
    cached_by_ranks,
    content,
    copy_of,
    direct_logits,
    planned,
    write_cache_config,
)
from tests.tiny import write_llama

TOP_K = {"source": "cache_topk", "top_k": 40, "max_truncation_error": 1.0}


@pytest.fixture(scope="module")
def ray_of_module() -> Iterator[None]:
    """Holds one Ray for all tests of a module. It is told of four GPUs, which nobody looks for."""
    initialise = session._initialise

    def with_gpus(what: str, **options: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # Ray counts them
            initialise(what, num_gpus=4, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_initialise", with_gpus)
        with session.ray_session(RayConfig(num_actors=2)):
            ray.cloudpickle.register_pickle_by_value(sys.modules[caching.__name__])
            yield


@pytest.fixture(scope="module")
def hidden(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> tuple[Path, RunDirectory]:
    """Returns (config, run directory) of hidden states that two actors have cached."""
    path = write_cache_config(tmp_path_factory.mktemp("hidden"), tiny_pair)
    return path, cached(path)


@pytest.fixture(scope="module")
def top_k(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> tuple[Path, RunDirectory]:
    """Returns (config, run directory) of 40 tokens per position, by two actors of two GPUs each."""
    teacher = {**TOP_K, "devices_per_actor": 2}
    path = write_cache_config(tmp_path_factory.mktemp("top_k"), tiny_pair, teacher=teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_actors, "CacheWorker", caching.NotesItsGPUs)
        return path, cached(path)


def examples_of(path: Path) -> tuple[EncodedExample, ...]:
    config = load_config([path])
    return prepare(config, RunDirectory(Path(config.run_dir))).examples


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_hidden_states_and_head_give_the_logits_of_the_teacher(
    hidden: tuple[Path, RunDirectory], tiny_pair: Pair
) -> None:
    path, run = hidden
    rows, head = content(run), read_head(run.teacher_cache, torch.device("cpu"))
    num_tokens = len(load_tokenizer(ModelFolder(tiny_pair[0], "teacher")))
    assert head.num_real_tokens == num_tokens < len(head.weight_VH)
    for example in examples_of(path):
        hidden_NH = rows.pop(example.example_id)["hidden_NH"]
        logits_NV = hidden_NH.double() @ head.weight_VH[:num_tokens].double().T
        expected_NV = direct_logits(tiny_pair[0], example, num_tokens)
        torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert not rows


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_and_tail_give_the_distribution_at_every_temperature(
    top_k: tuple[Path, RunDirectory], tiny_pair: Pair, temperature: float
) -> None:
    """Kept probabilities and an even tail, raised to 1/T and normalised, in float64."""
    path, run = top_k
    num_tokens = len(load_tokenizer(ModelFolder(tiny_pair[0], "teacher")))
    rows, errors = content(run), []
    for example in examples_of(path):
        p_NV = direct_logits(tiny_pair[0], example, num_tokens).softmax(-1)
        kept_NK = p_NV.topk(40).indices
        tail_N = 1 - p_NV.gather(1, kept_NK).sum(1)
        even_NV = (tail_N / (num_tokens - 40))[:, None].expand_as(p_NV)
        expected_NV = even_NV.scatter(1, kept_NK, p_NV.gather(1, kept_NK)) ** (1 / temperature)
        expected_NV /= expected_NV.sum(1, keepdim=True)
        row = rows[example.example_id]
        cut = TeacherTopK(row["token_ids_NK"], row["logprobs_NK"], row["log_tail_N"])
        found_NV = spread_logprobs(cut, num_tokens, temperature).exp().double()
        torch.testing.assert_close(found_NV, expected_NV, rtol=1e-4, atol=1e-7)
        true_NV = p_NV ** (1 / temperature) / (p_NV ** (1 / temperature)).sum(1, keepdim=True)
        errors += (true_NV - expected_NV).abs().sum(1).div(2).tolist()
    summary = json.loads((run.teacher_cache / "summary.json").read_text())
    reported = summary["truncation_error"][str(temperature)]
    assert reported == pytest.approx(math.fsum(errors) / len(errors), rel=1e-4)
    assert reported > 0


def test_with_all_tokens_kept_nothing_is_lost_and_the_tail_is_empty() -> None:
    torch.manual_seed(0)
    head = LMHead(torch.randn(50, 8), num_real_tokens=47)
    hidden_NH, errors = torch.randn(9, 8) * 3, {}  # type: ignore[var-annotated]
    cut = cut_to_top_k(hidden_NH, head, 47, TEMPERATURES, errors)
    assert torch.isneginf(cut.log_tail_N).all()
    assert max(errors.values()) < 1e-5
    for temperature in TEMPERATURES:
        expected_NV = (hidden_NH.double() @ head.weight_VH[:47].double().T / temperature).softmax(1)
        found_NV = spread_logprobs(cut, 47, temperature).exp().double()
        torch.testing.assert_close(found_NV, expected_NV, rtol=1e-5, atol=1e-9)


def test_a_gap_of_200_between_logits_leaves_tail_and_distribution_finite() -> None:
    hidden_NH = torch.tensor([[200.0, 0.0, -1.0]])
    cut = cut_to_top_k(hidden_NH, LMHead(torch.eye(3)), 1, [1.0], {})
    assert float(cut.log_tail_N) == pytest.approx(-200 + math.log1p(math.exp(-1)))
    assert torch.isfinite(spread_logprobs(cut, 3, 2.0)).all()


def test_a_finished_cache_is_left_alone(
    hidden: tuple[Path, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = hidden
    before = {file: file.stat().st_mtime_ns for file in run.root.rglob("*")}
    cached(path)
    assert "24 rows are cached already" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in run.root.rglob("*")}


def test_a_damaged_shard_is_found_by_its_hash_and_computed_again(
    hidden: tuple[Path, RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = hidden
    run = copy_of(whole, tmp_path / "run")
    shards = sorted(run.teacher_cache.glob("shard-*.safetensors"))
    flip_last_byte(shards[1])
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    shards[3].with_suffix(".json").write_text("{}")
    flip_last_byte(run.teacher_cache / "head.safetensors")
    cached(path, f"run_dir={run.root}")
    complaints = capsys.readouterr().err
    assert f"{shards[1]}: content changed (sha256 differs); it is computed again" in complaints
    assert len(complaints.splitlines()) == 4
    assert_same_content(whole, run)
    names = [file.name for file in whole.teacher_cache.glob("*.safetensors")]
    assert all(
        (run.teacher_cache / n).read_bytes() == (whole.teacher_cache / n).read_bytes()
        for n in names
    )


def test_a_head_that_is_gone_is_written_with_the_cheapest_shard(
    hidden: tuple[Path, RunDirectory], tmp_path: Path
) -> None:
    path, whole = hidden
    run = copy_of(whole, tmp_path / "run")
    (run.teacher_cache / "head.json").unlink()
    config = load_config([path], [f"run_dir={run.root}"])
    remove_damage(run)
    assert not (run.teacher_cache / "head.safetensors").exists()
    missing = missing_shards(config, run, prepare(config, run))
    assert [shard.index for shard in missing] == [5]


def test_a_stopped_pass_goes_on_and_an_actor_that_is_killed_changes_nothing(
    hidden: tuple[Path, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_cache_config(tmp_path, tiny_pair, ray={"num_actors": 1})
    config, run = planned(path)
    monkeypatch.setattr(cache_actors, "CacheWorker", caching.AsksToStop)
    with pytest.raises(StoppedError, match="the same command goes on"):
        cache(config, run)
    run.stop_file.unlink()
    finished = {file: file.stat().st_mtime_ns for file in run.teacher_cache.glob("shard-*.json")}
    assert 0 < len(finished) < 6 and not (run.teacher_cache / "summary.json").exists()
    monkeypatch.setattr(cache_actors, "CacheWorker", caching.DiesOnce)
    cached(path)
    assert (run.root / "died").exists()
    assert "its actor died, attempt 1 of 3; trying again" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
    assert_same_content(hidden[1], run)


@pytest.mark.parametrize("source", ["cache_hidden", "cache_topk"])
def test_two_ranks_with_a_partitioned_teacher_cache_what_actors_do(
    hidden: tuple[Path, RunDirectory],
    top_k: tuple[Path, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    source: str,
) -> None:
    """Stopped after one of three rounds, and resumed."""
    teacher = {**TOP_K, "source": source, "cache_engine": "zero3"}
    path = write_cache_config(tmp_path, tiny_pair, teacher=teacher, ray={"shard_size": 5})
    run = cached_by_ranks(path, 2, stop_after=1)
    assert len(list(run.teacher_cache.glob("shard-*.json"))) == 2
    cached_by_ranks(path, 2)
    assert (run.teacher_cache / "summary.json").exists()
    if source == "cache_hidden":
        assert_same_content(hidden[1], run, is_exact=False)
        head, expected = (read_head(r.teacher_cache, torch.device("cpu")) for r in (run, hidden[1]))
        assert torch.equal(head.weight_VH, expected.weight_VH)
        assert head.num_real_tokens == expected.num_real_tokens
    else:
        found, expected_rows = content(run), content(top_k[1])
        for example_id, row in expected_rows.items():
            logprobs = found[example_id]["logprobs_NK"]
            torch.testing.assert_close(logprobs, row["logprobs_NK"], rtol=2e-5, atol=2e-5)


def test_two_actors_take_two_gpus_each(top_k: tuple[Path, RunDirectory]) -> None:
    gpus = sorted(file.read_text() for file in top_k[1].root.glob("gpus-*"))
    assert gpus == ["0 1", "2 3"]


def test_a_teacher_in_two_places_answers_alike_and_one_without_a_place_is_refused(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    """accelerate's hooks move the hidden states; on a CPU the second place can be the disk only."""
    source = ModelFolder(tiny_pair[0], "teacher")
    places = {"model": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    places |= {
        f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")
    }
    del places["model"]
    whole = load_model(source, torch.float32)
    spread = load_model(source, torch.float32, device_map=places)
    ids_BT = torch.arange(8)[None]
    torch.testing.assert_close(spread(ids_BT).logits, whole(ids_BT).logits)
    check_placed(whole, 2)
    with pytest.raises(ConfigError, match=r"teacher\.devices_per_actor: 2 devices do not hold"):
        check_placed(spread, 2)


@pytest.mark.parametrize(
    ("num_actors", "num_gpus", "num_shards", "expected"),
    [(None, 8, 100, 2), (1, 8, 100, 1), (9, 8, 100, 2), (None, 8, 1, 1), (None, 4, 100, 1)],
)
def test_an_actor_gets_whole_groups_of_gpus(
    num_actors: int | None, num_gpus: int, num_shards: int, expected: int
) -> None:
    shape = actor_shape(RayConfig(num_actors=num_actors), 64, num_gpus, num_shards, 4)
    assert (shape.num_actors, shape.num_gpus) == (expected, 4.0)


def test_without_that_many_gpus_an_actor_of_several_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.devices_per_actor: 4 GPUs .* Ray has 2"):
        actor_shape(RayConfig(), 64, 2, 10, 4)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"data": {"template": "{prompt} ="}}, r"data\.template: it was made with 'short'"),
        ({"data": {"max_prompt_tokens": 20}}, r"data\.max_prompt_tokens: it was made with 48"),
        ({"engine": {"dtype": "bf16"}}, r"engine\.dtype: it was made with None, now 'bf16'"),
        ({"teacher": {"source": "cache_topk", "top_k": 9}}, r"teacher\.source"),
    ],
)
def test_a_cache_made_from_other_keys_is_refused_by_name(
    hidden: tuple[Path, RunDirectory], tiny_pair: Pair, tmp_path: Path, sections: dict, key: str
) -> None:
    run = copy_of(hidden[1], tmp_path / "run")
    path = write_cache_config(tmp_path, tiny_pair, **sections)
    with pytest.raises(MismatchError, match=key):
        cache(load_config([path], [f"run_dir={run.root}"]), run)
    assert_same_content(hidden[1], run)


def test_a_cache_of_another_teacher_is_refused(
    hidden: tuple[Path, RunDirectory], tiny_pair: Pair, tmp_path: Path
) -> None:
    run = copy_of(hidden[1], tmp_path / "run")
    other = write_llama(tmp_path / "other", hidden=32, layers=2, seed=9, num_phantom=8)
    path = write_cache_config(tmp_path, (other, *tiny_pair[1:]))
    with pytest.raises(MismatchError, match=r"models\.teacher model sha256"):
        cache(load_config([path], [f"run_dir={run.root}"]), run)


def test_with_too_little_disk_nothing_is_written_and_both_numbers_are_told(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cache_config(tmp_path, tiny_pair)
    config, run = planned(path)
    num_labels = sum(example.num_response_tokens for example in examples_of(path))
    num_rows = len(load_tokenizer(ModelFolder(tiny_pair[0], "teacher"))) + 8
    needed = (num_labels + num_rows) * 32 * 4
    monkeypatch.setattr(cache_step, "free_bytes", lambda _: needed - 1)
    with pytest.raises(StorageError, match=f"needs about {needed} bytes .* {needed - 1} bytes are"):
        cache(config, run)
    assert not run.teacher_cache.exists()


def test_the_size_that_is_told_before_is_that_of_the_files(
    hidden: tuple[Path, RunDirectory], top_k: tuple[Path, RunDirectory]
) -> None:
    for path, run in (hidden, top_k):
        job = prepare(load_config([path]), run)
        told = job.head_bytes + job.label_bytes * sum(e.num_response_tokens for e in job.examples)
        files = [file.stat().st_size for file in run.teacher_cache.glob("*.safetensors")]
        headers = 300 * len(files)  # what safetensors says of each tensor
        assert told <= sum(files) <= told + headers


def test_more_tokens_than_the_vocabulary_has_are_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    path = write_cache_config(tmp_path, tiny_pair, teacher={**TOP_K, "top_k": 5000})
    config, run = planned(path)
    with pytest.raises(ConfigError, match=r"teacher\.top_k: 5000 is more than the \d+ tokens"):
        cache(config, run)
    assert not run.teacher_cache.exists()


def test_a_truncation_error_above_the_bound_is_refused_with_what_helps(
    top_k: tuple[Path, RunDirectory], tmp_path: Path
) -> None:
    """The bound is no part of the cache: with a higher one it is finished."""
    path, run = top_k
    summary = json.loads((run.teacher_cache / "summary.json").read_text())
    worst = max(summary["truncation_error"].values())
    cached(path, f"teacher.max_truncation_error={worst * 1.01}")
    with pytest.raises(ConfigError, match=r"teacher\.top_k: 40 .* Raise top_k .* cache_hidden"):
        cached(path, f"teacher.max_truncation_error={worst * 0.99}")


def test_without_a_plan_the_cache_asks_for_one(tiny_pair: Pair, tmp_path: Path) -> None:
    config = load_config([write_cache_config(tmp_path, tiny_pair)])
    with pytest.raises(MissingInputError, match="plan"):
        cache(config, RunDirectory(Path(config.run_dir)))


def test_an_online_teacher_has_nothing_to_cache_and_a_cache_needs_a_teacher(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    path = write_cache_config(tmp_path, tiny_pair, teacher={"source": "online"})
    with pytest.raises(ConfigError, match=r"teacher\.source: 'online'"):
        cached(path)
    path = write_cache_config(tmp_path, tiny_pair, models={"teacher": None})
    with pytest.raises(ConfigError, match=r"teacher\.source: 'cache_hidden' needs models\.teacher"):
        load_config([path])


def test_shards_depend_on_the_rows_alone_and_two_layouts_never_share_a_name() -> None:
    rows = [
        EncodedExample(f"r{i}", tuple(range(3 + i % 5)), 1 + i % 2, False, False) for i in range(23)
    ]
    shards = make_cache_shards(rows, 4, 6)
    assert shards == make_cache_shards(rows[::-1], 4, 6)
    assert [shard.num_rows for shard in shards] == [8, 8, 7]
    lengths = [len(example.token_ids) for shard in shards for example in shard.examples]
    assert lengths == sorted(lengths, reverse=True)
    others = {shard.name for shard in make_cache_shards(rows, 4, 3)}
    assert not others & {shard.name for shard in shards}


def test_what_a_killed_writer_left_is_removed(
    hidden: tuple[Path, RunDirectory], tmp_path: Path
) -> None:
    path, whole = hidden
    run = copy_of(whole, tmp_path / "run")
    half = run.teacher_cache / ".tmp-shard-00001.safetensors-1"
    half.write_bytes(b"half")
    stray = run.teacher_cache / "shard-00099-abc.safetensors"
    shutil.copy(next(run.teacher_cache.glob("shard-*.safetensors")), stray)
    cached(path, f"run_dir={run.root}")
    assert not half.exists() and not stray.exists()
    assert_same_content(whole, run)


def test_a_teacher_without_memory_caches_the_same_and_a_row_that_fails_stops_the_run(
    hidden: tuple[Path, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_cache_config(tmp_path, tiny_pair, ray={"num_actors": 1})
    config, run = planned(path)
    monkeypatch.setattr(cache_actors, "CacheWorker", caching.Troubled)
    monkeypatch.setattr(caching.Troubled, "failing", frozenset({"row-005"}))
    with pytest.raises(DataError, match=r"could not answer 1 rows .*'row-005'\): IndexError") as e:
        cache(config, run)
    assert "teacher.source: online" in str(e.value)
    assert not (run.teacher_cache / "summary.json").exists()
    found, expected = content(run), content(hidden[1])
    del expected["row-005"]
    assert found.keys() == expected.keys()
    for example_id, tensors in found.items():
        torch.testing.assert_close(tensors, expected[example_id], rtol=2e-5, atol=2e-5)
    assert sum(entry.num_halved for entry in read_shards(run.teacher_cache)) == 12


@pytest.mark.slow
def test_a_row_that_failed_is_tried_again_and_the_shard_without_it_is_gone(
    hidden: tuple[Path, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_cache_config(tmp_path, tiny_pair, ray={"num_actors": 1})
    config, run = planned(path)
    with monkeypatch.context() as patch:
        patch.setattr(cache_actors, "CacheWorker", caching.Troubled)
        patch.setattr(caching.Troubled, "failing", frozenset({"row-005"}))
        with pytest.raises(DataError):
            cache(config, run)
    cache(config, run)
    assert_same_content(hidden[1], run, is_exact=False)
    assert not (run.teacher_cache / "quarantine.jsonl").exists()
    assert read_json(run.teacher_cache / "summary.json")["num_examples"] == 24
