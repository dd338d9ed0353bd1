"""The bundled rows can be made again, the splits are clean, and the bundled models work."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pocl_dist.bundled import make_rows, tiny
from pocl_dist.bundled.tasks import TASKS

FOLDER = Path(make_rows.__file__).parent
SPLITS = ("train", "dev", "test")
MODELS = ("teacher", "student")


def read_rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_making_the_rows_again_gives_the_same_bytes(tmp_path: Path) -> None:
    make_rows.write_rows(tmp_path)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_splits_have_their_sizes_and_share_no_question() -> None:
    rows = [row for split in SPLITS for row in read_rows(split)]
    assert {split: len(read_rows(split)) for split in SPLITS} == make_rows.SPLIT_SIZES
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_more_rows_ask_nothing_twice_and_nothing_of_the_bundled_rows(tmp_path: Path) -> None:
    make_rows.write_more_rows(tmp_path, {"dev": 42, "test": 70})
    lines = [(tmp_path / f"{name}.jsonl").read_text() for name in ("dev", "test")]
    more = [json.loads(line) for text in lines for line in text.splitlines()]
    rows = more + [row for split in SPLITS for row in read_rows(split)]
    assert len({(row["instruction"], row["input"]) for row in rows}) == 112 + 1896
    assert {row["task"] for row in more} == set(TASKS)
    make_rows.write_more_rows(tmp_path, {"dev": 42, "test": 70})
    assert [(tmp_path / f"{name}.jsonl").read_text() for name in ("dev", "test")] == lines


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_is_in_every_split_about_equally_often(split: str) -> None:
    tasks = [row["task"] for row in read_rows(split)]
    counts = [tasks.count(task) for task in TASKS]
    assert set(tasks) == set(TASKS)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_model_and_tokenizer_load_and_agree(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert str(model.dtype) == "torch.float32"
    text = "### Instruction:\nCopy these words.\ncat dog\n\n### Response:\n"
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.eos_token_id not in token_ids


def test_teacher_and_student_have_the_same_tokenizer_files() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / "teacher" / name).read_bytes() == (FOLDER / "student" / name).read_bytes()


def test_models_are_small_enough_to_commit() -> None:
    files = [path for name in MODELS for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_teacher_answers_test_rows_well() -> None:
    rows = make_rows.read_split(FOLDER, "test")[:24]
    teacher = LlamaForCausalLM.from_pretrained(FOLDER / "teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / "teacher")
    answers = tiny.answers(teacher, tokenizer, rows)
    assert sum(answer.rouge for answer in answers) / len(answers) >= 75
