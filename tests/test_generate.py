"""generate on real actors: answers as a data set, resumed, refused, and the baselines over it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_dist.config import Config, load_config
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import ConfigError, DataError, MismatchError, MissingInputError, StoppedError
from pocl_dist.files import read_json, read_json_lines, sha256_file
from pocl_dist.models.generation import Sampling, generate_answers
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.generate import generate
from pocl_dist.pipeline.generated_files import row_of, write_data_set
from pocl_dist.pipeline.inputs import make_encoder, read_prompts, read_train
from pocl_dist.pipeline.run import steps_of
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import RowFailure
from pocl_dist.shard_files import seal_of
from tests.fixtures_models import make_run, write_varied_rows
from tests.fixtures_models import ray_of_module as ray_of_module
from tests.tiny import make_tokenizer
from tests.training import distill, step_rows

Pair = tuple[Path, Path, Path]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 5}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_mixed_rows(path: Path) -> Path:
    """Writes every form of row that the reader takes, with and without ids, two of them alike."""
    system = {"role": "system", "content": "be brief"}
    turns = [("user", "say the cat"), ("assistant", "the cat"), ("user", "say  two\ndogs ")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = {"role": "assistant", "content": "two dogs"}
    rows = [
        {"id": 7, "instruction": "say it", "input": " one\n\nbig", "output": ["one", "big"]},
        {"prompt": " say on the mat", "response": "on the mat"},
        {"prompt": " say on the mat", "response": "on the mat"},
        {"messages": [system, *messages, answer]},
        {"id": "m", "messages": [messages[0], answer]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_generating_run(
    folder: Path, pair: Pair, **sections: object
) -> tuple[Config, RunDirectory]:
    folder.mkdir(exist_ok=True)
    teacher, student, _ = pair
    data = {"responses": "teacher", **sections.pop("data", {})}  # type: ignore[dict-item]
    train = write_varied_rows(folder / "train.jsonl")
    return make_run(folder, student, train, teacher, data=data, **sections)


@pytest.mark.parametrize("template", ["short", "alpaca", "chat", "Q: {prompt}\nA:"])
def test_rows_are_read_back_with_the_ids_and_prompts_that_they_had(
    tmp_path: Path, template: str
) -> None:
    from pocl_dist.data.encoding import Encoder

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    encoder = Encoder(tokenizer, template, 400, 300)
    before = read_rows(str(write_mixed_rows(tmp_path / "rows.jsonl")), "data.train").examples
    rows = [row_of(example, f"answer {index}") for index, example in enumerate(before)]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = read_rows(str(tmp_path / "out.jsonl"), "data.responses").examples
    assert [e.example_id for e in after] == [e.example_id for e in before]
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert encoder.encode(new).prompt_ids == encoder.encode(old).prompt_ids
        assert new.references == (f"answer {index}",)


@pytest.fixture(scope="module")
def generated(
    tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory, ray_of_module: None
) -> tuple[Config, RunDirectory]:
    config, run = make_generating_run(tmp_path_factory.mktemp("generated"), tiny_pair)
    generate(config, run)
    return config, run


def test_the_data_set_holds_the_teachers_answers_in_the_order_of_the_rows(
    generated: tuple[Config, RunDirectory], tiny_pair: Pair
) -> None:
    config, run = generated
    source = ModelFolder(tiny_pair[0], "teacher")
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    encoder = make_encoder(config, tokenizer)
    rows = read_json_lines(run.generated / "train.jsonl")
    expected, left_out = [], []
    for example in read_prompts(config).examples:
        ids = encoder.encode(example).prompt_ids
        answer = generate_answers(model, tokenizer, [ids], Sampling(6))[0]
        # Random weights say NUL at times, which no row may hold.
        (left_out if "\0" in answer or not answer else expected).append((example, answer))
    assert len(left_out) < 3 and len(expected) + len(left_out) == 24
    assert [(row["id"], row["instruction"], row["output"]) for row in rows] == [
        (example.example_id, example.prompt, answer) for example, answer in expected
    ]
    provenance = read_json(run.generated / "train.provenance.json")
    assert provenance["sha256"] == sha256_file(run.generated / "train.jsonl")
    assert provenance["num_rows"] == len(expected) and provenance["num_unusable"] == len(left_out)
    assert read_train(config).examples[3].references == (rows[3]["output"],)


def test_a_data_set_that_is_there_is_left_alone(
    generated: tuple[Config, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = generated
    before = {path: path.stat().st_mtime_ns for path in run.generated.iterdir()}
    generate(config, run)
    assert "train.jsonl is there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.generated.iterdir()}


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("generate", {"seed": 1}, r"generate\.seed"),
        ("generation", {"max_new_tokens": 5}, r"generation\.max_new_tokens"),
        ("data", {"template": "alpaca"}, r"data\.template"),
        ("data", {"limit": 20}, r"data\.limit"),
    ],
)
def test_another_input_is_refused_by_name(
    generated: tuple[Config, RunDirectory],
    tiny_pair: Pair,
    tmp_path: Path,
    section: str,
    value: dict,
    key: str,
) -> None:
    other, _ = make_generating_run(tmp_path, tiny_pair, **{section: value})
    with pytest.raises(MismatchError, match=key):
        generate(other, generated[1])
    run_dir = str(generated[1].root)
    with pytest.raises(MismatchError, match=key):  # what trains on it refuses it too
        read_train(other.model_copy(update={"run_dir": run_dir}))


def test_another_teacher_and_a_changed_data_set_are_refused(
    generated: tuple[Config, RunDirectory], tiny_pair: Pair, tmp_path: Path
) -> None:
    config, run = generated
    shutil.copytree(run.generated, tmp_path / "run" / "generated")
    copied = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    with (tmp_path / "run" / "generated" / "train.jsonl").open("a") as handle:
        handle.write("\n")
    with pytest.raises(MismatchError, match="was changed after it was generated"):
        read_train(copied)
    other, _ = make_generating_run(
        tmp_path / "b", (tiny_pair[1], tiny_pair[1], tiny_pair[2]), data={}
    )
    with pytest.raises(MismatchError, match=r"models\.teacher"):
        generate(other, run)


def test_a_file_of_another_program_is_not_overwritten(tiny_pair: Pair, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("{}\n")
    config, run = make_generating_run(tmp_path, tiny_pair, generate={"output": str(theirs)})
    with pytest.raises(MismatchError, match="not overwritten"):
        generate(config, run)
    assert theirs.read_text() == "{}\n"


def test_an_interrupted_sampled_pass_ends_with_the_same_bytes(
    tiny_pair: Pair, tmp_path: Path, ray_of_module: None
) -> None:
    """Two actors and no stop; then a stop at once, a lost shard, one actor, larger shards."""
    config, run = make_generating_run(tmp_path / "a", tiny_pair, generate=SAMPLED)
    generate(config, run)
    output = tmp_path / "b" / "data" / "answers.jsonl"
    config, other = make_generating_run(
        tmp_path / "b",
        tiny_pair,
        generate={**SAMPLED, "output": str(output)},
        ray={"num_actors": 1, "shard_size": 24},
    )
    # The rows are the same file for both: the path is part of what is compared.
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": str(tmp_path / "a/train.jsonl")})}
    )
    other.stop_file.parent.mkdir(parents=True)
    other.stop_file.touch()
    with pytest.raises(StoppedError, match="the same command goes on"):
        generate(config, other)
    other.stop_file.unlink()
    kept = sorted(run.generated.glob("shard-*.json"))
    assert len(kept) == 3
    shutil.copy(kept[1], other.generated)
    shutil.copy(seal_of(kept[1]), other.generated)
    generate(config, other)
    assert output.read_bytes() == (run.generated / "train.jsonl").read_bytes()
    greedy = read_json_lines(output)
    assert len({row["output"] for row in greedy}) > 12  # sampled


def test_empty_answers_are_counted_and_listed_and_too_many_end_the_step(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    config, run = make_generating_run(tmp_path, tiny_pair)
    examples = read_prompts(config).examples
    answers = {
        e.example_id: "\0" if i == 2 else "  " * (i == 5) or "x" for i, e in enumerate(examples)
    }
    answers[examples[5].example_id] = " "
    unusable = write_data_set(config, run, examples, answers, {}, {})
    assert unusable == read_json_lines(run.generated / "unusable.jsonl")
    assert [row["example_id"] for row in unusable] == ["row-002", "row-005"]
    assert "NUL" in unusable[0]["reason"] and "empty" in unusable[1]["reason"]
    written = [row["id"] for row in read_json_lines(run.generated / "train.jsonl")]
    assert written == [e.example_id for i, e in enumerate(examples) if i not in (2, 5)]
    failed = {"row-007": RowFailure("row-007", "lost", "its actor died")}
    unusable = write_data_set(config, run, examples, answers, {}, failed, num_halved=3)
    assert unusable[2] == {"example_id": "row-007", "reason": "its actor died"}
    provenance = read_json(run.generated / "train.provenance.json")
    assert (provenance["num_rows"], provenance["num_halved_batches"]) == (21, 3)
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 1})})
    with pytest.raises(DataError, match=r"2 of 24 answers.*max_bad_rows is 1"):
        write_data_set(strict, run, examples, answers, {}, {})


def test_what_cannot_work_is_refused_before_anything_starts(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    config, run = make_run(tmp_path, tiny_pair[1], tiny_pair[2], None)
    with pytest.raises(ConfigError, match=r"models\.teacher"):
        generate(config, run)
    with pytest.raises(ConfigError, match=r"data\.responses: 'teacher' needs models\.teacher"):
        make_run(tmp_path, tiny_pair[1], tiny_pair[2], None, data={"responses": "teacher"})
    config, _ = make_generating_run(tmp_path / "b", tiny_pair)
    with pytest.raises(MissingInputError, match="pocl-dist generate"):
        read_train(config)
    assert [name for name, _ in steps_of(config)][:3] == ["generate", "measure", "plan"]


# ---------------------------------------------------------------------------------------- baselines


def losses(model_folder: Path, teacher_folder: Path, rows: list[dict]) -> tuple[float, float]:
    """Returns (mean cross-entropy, mean forward KL at T = 1) of the responses, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (model_folder, teacher_folder)
    )
    sums, count = [0.0, 0.0], 0
    for row in rows:
        prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n")[
            "input_ids"
        ]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            q, p = (
                model(torch.tensor([prompt + answer]))
                .logits[0, at, : len(tokenizer)]
                .log_softmax(-1)
                for model in (student, teacher)
            )
        sums[0] -= float(q[range(len(answer)), answer].sum())
        sums[1] += float((p.exp() * (p - q)).sum())
        count += len(answer)
    return sums[0] / count, sums[1] / count


@pytest.mark.parametrize("method", ["sft", "seqkd", "plain_kd"])
def test_a_baseline_is_a_few_keys_and_trains_on_its_loss(
    tiny_pair: Pair, tmp_path: Path, ray_of_module: None, method: str
) -> None:
    """One step over all rows: its loss is the formula's. SeqKD does not load the teacher."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_pair[0], teacher)
    train = write_varied_rows(tmp_path / "train.jsonl", 12)
    sections: dict = {
        "curriculum": {"num_stages": 1, "epochs_per_stage": 1, "ordering": "curriculum"},
        "engine": {"micro_batch_size": 4, "global_batch_size": 12},
    }
    if method == "seqkd":
        sections["data"] = {"responses": "teacher"}
        sections["curriculum"]["kd_ratio"] = 0.0
    given = None if method == "sft" else teacher
    config, run = make_run(tmp_path, tiny_pair[1], train, given, **sections)
    rows = read_json_lines(train)
    if method == "seqkd":
        generate(config, run)
        rows = read_json_lines(run.generated / "train.jsonl")
    expected = losses(tiny_pair[1], tiny_pair[0], rows)
    if method == "seqkd":
        (teacher / "model.safetensors").write_bytes(b"not weights")
    distill(tmp_path / "config.yaml", 1)
    step = step_rows(run)[0]
    assert len(step_rows(run)) == 1
    assert step["kd_ratio"] == (1.0 if method == "plain_kd" else 0.0)
    assert step["temperature"] == 1.0
    assert step["loss"] == pytest.approx(expected[method == "plain_kd"], rel=1e-5)
    assert load_config([tmp_path / "config.yaml"]).curriculum.num_stages == 1
