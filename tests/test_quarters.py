"""Difficulty quarters during training: which rows, what they score, on any ranks, once per end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pocl_dist.config import load_config
from pocl_dist.data.columns import text_array, write_columns
from pocl_dist.data.sources import Rows
from pocl_dist.files import read_json_lines
from pocl_dist.metrics import rouge_l
from pocl_dist.models.loading import load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.plan_files import ranked_rows, read_plan
from pocl_dist.pipeline.quarter_rows import choose_quarters
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Example
from tests.caching import cached_by_ranks, copy_of
from tests.tiny import write_config
from tests.training import distill

Pair = tuple[Path, Path, Path]
NAMES = [f"row-{index:03d}" for index in range(24)]


def _quarters(config: Path, names: list[str], *overrides: str) -> list[list[str]]:
    loaded = load_config([config], overrides)
    rows = Rows("rows", tuple(Example(name, "", "", ("",)) for name in names), (), "")
    run = RunDirectory(Path(loaded.run_dir))
    chosen = choose_quarters(loaded, run, rows, np.arange(len(names)))
    return [[names[place] for place in quarter] for quarter in chosen]


@pytest.fixture(scope="module")
def curriculum(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    return write_config(folder, *tiny_pair, curriculum={"ordering": "curriculum"})


@pytest.mark.parametrize("num_rows", [1, 3, 100])
@pytest.mark.parametrize("num_ranked", [4, 7, 24, 1000])
def test_each_quarter_is_drawn_from_its_own_part_of_the_ranking(
    curriculum: Path, num_rows: int, num_ranked: int
) -> None:
    names = [f"{index}" for index in range(num_ranked)]
    words = [f"dev.quarter_rows={num_rows}"]
    quarters = _quarters(curriculum, names, *words)
    part = num_ranked // 4
    bounds = [0, part, 2 * part, 3 * part, num_ranked]
    for index, quarter in enumerate(quarters):
        low, high = bounds[index], bounds[index + 1]
        assert len(quarter) == min(num_rows, high - low) == len(set(quarter))
        assert all(low <= int(name) < high for name in quarter)
    assert quarters == _quarters(curriculum, names, *words)
    reversed_plan = _quarters(curriculum, names[::-1], *words, "curriculum.ordering=reversed")
    assert reversed_plan == quarters, "the first quarter is the easiest, whatever is trained first"


def test_another_seed_draws_other_rows_and_no_rows_or_no_ranking_draws_none(
    curriculum: Path,
) -> None:
    some = _quarters(curriculum, NAMES, "dev.quarter_rows=3")
    assert some != _quarters(curriculum, NAMES, "dev.quarter_rows=3", "seed=1")
    assert _quarters(curriculum, NAMES, "dev.quarter_rows=0") == []
    assert _quarters(curriculum, NAMES, "dev.quarter_rows=3", "curriculum.num_stages=1") == []
    assert _quarters(curriculum, NAMES, "dev.quarter_rows=3", "curriculum.ordering=shuffled") == []


def test_fewer_rows_than_quarters_all_stand_in_the_last(curriculum: Path) -> None:
    assert _quarters(curriculum, ["a", "b", "c"], "dev.quarter_rows=2")[:3] == [[], [], []]
    assert len(_quarters(curriculum, ["a", "b", "c"], "dev.quarter_rows=2")[3]) == 2


def _ranked(run: RunDirectory) -> None:
    """Puts a ranking into the run, hard rows in the order of their names reversed."""
    names = text_array(NAMES[::-1])
    file = run.difficulty / "ranking.parquet"
    write_columns(file, len(names), lambda part: {"example_id": names[part]})


def _config(folder: Path, pair: Pair | tuple[None, Path, Path], **sections: dict) -> Path:
    """Writes a config over 24 rows with a ranking of their own beside shuffled stages."""
    path = write_config(folder, *pair, dev={"quarter_rows": 3}, **sections)
    _ranked(RunDirectory(Path(load_config([path]).run_dir)))
    return path


def _lines(run: RunDirectory) -> list[dict]:
    return [row for row in read_json_lines(run.metrics) if row["kind"] == "quarters"]


def _numbers(rows: list[dict]) -> torch.Tensor:
    keys = ("rouge_l", "cross_entropy", "kl")
    return torch.tensor([[row[key] for key in keys] for row in rows], dtype=torch.float64)


@pytest.fixture(scope="module")
def whole(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns a run on two ranks that scored its quarters."""
    return distill(_config(tmp_path_factory.mktemp("whole"), tiny_pair), 2)


def test_quarters_are_scored_before_training_and_at_every_stage_end(whole: RunDirectory) -> None:
    rows = _lines(whole)
    ends = [stage.num_steps for stage in read_plan(whole.plan).stages]
    expected = [(0, 0), (ends[0], 0), (ends[0] + ends[1], 1)]
    assert [(row["step"], row["stage"]) for row in rows] == expected
    assert all(row["num_rows"] == [3, 3, 3, 3] and "loss" not in row for row in rows)
    last = [r["kind"] for r in read_json_lines(whole.metrics) if r["step"] == rows[-1]["step"]]
    assert last == ["step", "quarters", "checkpoint"], "what is saved knows that it was scored"


def test_the_last_line_is_what_plain_transformers_say_of_the_export(
    whole: RunDirectory, tiny_pair: Pair
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config([whole.root.parent / "config.yaml"])
    tokenizer = AutoTokenizer.from_pretrained(whole.export)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_pair[0], dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(whole.export, dtype=torch.float64)
    rows = {row["id"]: row for row in map(json.loads, tiny_pair[2].read_text().splitlines())}
    train = read_train(config)
    ranking = ranked_rows(read_plan(whole.plan), train)
    chosen = choose_quarters(config, whole, train, ranking)
    quarters = [[train.examples[place].example_id for place in quarter] for quarter in chosen]
    assert all(name in NAMES[18:] for name in quarters[0]), "the ranking of the folder counts"
    line = _lines(whole)[-1]
    torch.set_num_threads(1)  # so small a model costs its threads
    for index, quarter in enumerate(quarters):
        ce_sum, kl_sum, num_tokens, scores = 0.0, 0.0, 0, []
        for row in (rows[name] for name in quarter):
            prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n")
            answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt["input_ids"] + answer])
            at = slice(len(prompt["input_ids"]) - 1, -1)
            with torch.no_grad():
                p, q = (
                    m(ids).logits[0, at, : len(tokenizer)].log_softmax(-1)
                    for m in (teacher, student)
                )
            ce_sum -= float(q[range(len(answer)), answer].sum())
            kl_sum += float((p.exp() * (p - q)).sum())
            num_tokens += len(answer)
            inputs = torch.tensor([prompt["input_ids"]])
            output = student.generate(inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
            text = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
            scores.append(100 * rouge_l(text.strip(), [row["output"]]))
        assert line["cross_entropy"][index] == pytest.approx(ce_sum / num_tokens, rel=1e-4)
        assert line["kl"][index] == pytest.approx(kl_sum / num_tokens, rel=1e-4)
        assert line["rouge_l"][index] == pytest.approx(math.fsum(scores) / 3)


def test_one_rank_scores_what_two_do(whole: RunDirectory, tiny_pair: Pair, tmp_path: Path) -> None:
    run = distill(_config(tmp_path, tiny_pair), 1)
    torch.testing.assert_close(_numbers(_lines(run)), _numbers(_lines(whole)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_does_not_notice_the_quarters(
    whole: RunDirectory, tiny_pair: Pair, tmp_path: Path
) -> None:
    without = distill(_config(tmp_path, tiny_pair), 2, "dev.quarter_rows=0")
    assert _lines(without) == []
    names = ("loss", "kl", "grad_norm")
    mine, theirs = (
        [[row[k] for k in names] for row in read_json_lines(r.metrics) if row["kind"] == "step"]
        for r in (whole, without)
    )
    assert mine == theirs


@pytest.mark.slow
def test_a_run_stopped_at_a_stage_end_goes_on_and_has_each_line_once(
    whole: RunDirectory, tiny_pair: Pair, tmp_path: Path
) -> None:
    path = _config(tmp_path, tiny_pair)
    end = _lines(whole)[1]["step"]
    run = distill(path, 2, stop_after=end)
    assert [row["step"] for row in _lines(run)] == [0], "a stop is not kept waiting"
    distill(path, 2, stop_after=end + 1)  # scored, then stopped: the checkpoint at the end is older
    assert [row["step"] for row in _lines(run)] == [0, end]
    distill(path, 2)
    measured = {"seconds"}
    mine, theirs = (
        [{k: v for k, v in row.items() if k not in measured} for row in _lines(r)]
        for r in (run, whole)
    )
    assert mine == theirs


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cache_hidden", "cache_topk"])
def test_a_cached_teacher_gives_the_same_quarters(
    whole: RunDirectory, tiny_pair: Pair, tmp_path: Path, source: str
) -> None:
    top_k = len(load_tokenizer(ModelFolder(tiny_pair[0], "teacher")))
    teacher = {"source": source, "top_k": top_k, "cache_engine": "zero3"}
    path = _config(tmp_path, tiny_pair, teacher=teacher)
    run = copy_of(cached_by_ranks(path, 1), tmp_path / "copy")
    distill(path, 2, f"run_dir={run.root}")
    torch.testing.assert_close(_numbers(_lines(run)), _numbers(_lines(whole)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_without_a_teacher_the_kl_is_null(tiny_pair: Pair, tmp_path: Path) -> None:
    run = distill(_config(tmp_path, (None, *tiny_pair[1:])), 1)
    assert [row["kl"] for row in _lines(run)] == [[None] * 4] * 3
    assert all(value > 0 for row in _lines(run) for value in row["cross_entropy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"models": {"lora": True}},
        {"loss": {"full_logits": True}},
        {"engine": {"zero_stage": 0, "micro_batch_size": 3, "global_batch_size": 8}},
    ],
    ids=["lora", "full logits", "ZeRO 0"],
)
def test_other_students_and_engines_are_scored_alike(
    tiny_pair: Pair, tmp_path: Path, whole: RunDirectory, sections: dict
) -> None:
    if "models" in sections:
        student = {"path": str(tiny_pair[1]), "lora": {"rank": 2}}
        sections = {"models": {"teacher": {"path": str(tiny_pair[0])}, "student": student}}
    run = distill(_config(tmp_path, tiny_pair, **sections), 2)
    first = _lines(run)[0]
    # Before training all of them are the same student.
    torch.testing.assert_close(_numbers([first]), _numbers(_lines(whole)[:1]), rtol=1e-4, atol=1e-6)
