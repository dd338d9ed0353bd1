"""The student's own answers: the same for any number of ranks, any stop, and seen by no loss."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_dist.config import Config, PolicyConfig, load_config
from pocl_dist.errors import ConfigError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.models.generation import Sampling, generate_answers, generate_token_ids
from pocl_dist.on_policy.policy import AnswerSource, OnPolicy, choose_source
from pocl_dist.on_policy.replay_buffer import ReplayBuffer, with_answer
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.step_answers import AnsweredBatch
from pocl_dist.records import EncodedExample
from tests.ranks import run_ranks, run_ranks_with_errors
from tests.tiny import write_config, write_llama
from tests.training import checkpoint_tensors, distill, step_rows

Pair = tuple[Path, Path, Path]
DATA, STUDENT, REPLAY = AnswerSource
TIMES = ("tokens_per_second", "peak_memory_bytes", "generation_seconds")
ADAPTIVE = {
    "curriculum": {"num_stages": 2, "epochs_per_stage": 3, "ordering": "shuffled"},
    "policy": {"mode": "adaptive", "initial_ratio": 0.7, "loss_tolerance": 0.0,
               "ratio_increment": 0.1, "replay_buffer_size": 12, "batch_size": 4},
    "dev": {"metric": "loss", "every": 3},
}  # fmt: skip


def adaptive_config(folder: Path, pair: Pair) -> Path:
    data = {"dev": str(pair[2]), "dev_limit": 6, "template": "short", "max_tokens": 64,
            "max_prompt_tokens": 48}  # fmt: skip
    return write_config(folder, *pair, data=data, **ADAPTIVE)


def example(name: str, *answer: int) -> EncodedExample:
    return EncodedExample(name, (7, 8, *answer), 2, False, False)


# ------------------------------------------------------------------------------------------ choices


def test_each_mode_chooses_as_its_paper_says() -> None:
    on, mixed = PolicyConfig(mode="on"), PolicyConfig(mode="mixed", on_policy_ratio=0.3)
    adaptive = PolicyConfig(mode="adaptive")
    assert choose_source(on, 0.0, 0.999, 0.5, False) == STUDENT
    assert [choose_source(mixed, 0.0, u, 0.5, True) for u in (0.29, 0.3)] == [STUDENT, DATA]
    # phi = 0.8, half of the run gone: below 0.4 new, up to 0.8 from the buffer once it is full.
    draws = (0.39, 0.4, 0.79, 0.8)
    full = [choose_source(adaptive, 0.8, u, 0.5, True) for u in draws]
    filling = [choose_source(adaptive, 0.8, u, 0.5, False) for u in draws]
    assert full == [STUDENT, REPLAY, REPLAY, DATA]
    assert filling == [STUDENT, STUDENT, STUDENT, DATA]


def _policy(tmp_path: Path, rank: object = None, **policy: object) -> OnPolicy:
    config = write_config(
        tmp_path, Path("t"), Path("s"), Path("r"), data={"dev": "d"}, policy=policy
    )
    return OnPolicy(load_config([config]), 100, rank)  # type: ignore[arg-type]


def _sources(path: str) -> list[int]:
    from pocl_dist.distributed.process_group import join_process_group

    rank = join_process_group(60)
    policy = OnPolicy(load_config([path]), 2000, rank)
    if rank.index == 1:  # what this rank would choose does not count
        policy.state.ratio = 0.0
    return [int(policy.next_source(step)) for step in range(2000)]


def test_all_ranks_take_rank_0s_choice_and_a_share_lambda_of_steps_is_on_policy(
    tmp_path: Path,
) -> None:
    policy = {"mode": "adaptive", "initial_ratio": 0.3}
    path = write_config(tmp_path, Path("t"), Path("s"), Path("r"), data={"dev": "d"}, policy=policy)
    first, second = run_ranks(_sources, 2, str(path))
    assert first == second
    share = sum(source != DATA for source in first) / len(first)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(first)) ** 0.5


def test_phi_rises_when_the_dev_loss_is_above_its_lowest_since_the_last_raise(
    tmp_path: Path,
) -> None:
    policy = _policy(tmp_path, mode="adaptive", loss_tolerance=0.1, ratio_increment=0.4)
    ratios = []
    for loss in (2.0, 1.5, 1.59, 1.61, 1.65, 1.72, 1.2, 1.31):
        policy.record_dev_loss(loss)
        ratios.append(policy.state.ratio)
    assert ratios == pytest.approx([0, 0, 0, 0.4, 0.4, 0.8, 0.8, 1.0])


# ----------------------------------------------------------------------------------- replay buffer


def test_the_buffer_keeps_the_latest_answers_and_draws_each_at_most_once() -> None:
    buffer = ReplayBuffer(4)
    buffer.add([example(str(index), index) for index in range(3)])
    assert not buffer.is_full
    buffer.add([example(str(index), index) for index in range(3, 7)])
    assert buffer.is_full and len(buffer) == 4
    drawn = buffer.sample(4, np.random.default_rng(1))
    assert sorted(answer.example_id for answer in drawn) == ["3", "4", "5", "6"]
    assert drawn == buffer.sample(4, np.random.default_rng(1))
    assert drawn != buffer.sample(4, np.random.default_rng(2))


def test_a_buffer_survives_its_tensors() -> None:
    encoded = {name: example(name, 1, 2, 3) for name in ("a", "two\nlines", "ü ", "")}
    buffer = ReplayBuffer(5)
    buffer.add([with_answer(encoded[name], [9] * length, length > 2)
                for name, length in zip(encoded, (1, 4, 2, 3), strict=True)])  # fmt: skip
    buffer.add([with_answer(encoded["a"], [5], False)])
    for source in (buffer, ReplayBuffer(5)):
        restored = ReplayBuffer(5)
        restored.add([example("x", 1)])
        restored.restore(source.to_tensors(), encoded)
        assert list(restored._answers) == list(source._answers)


# -------------------------------------------------------------------------------------- the answers


def test_answers_as_token_ids_end_with_their_first_eos_and_hold_no_padding_row(
    tmp_path: Path,
) -> None:
    folder = write_llama(tmp_path, hidden=16, layers=1, seed=3, is_tied=False, num_phantom=8)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        head = model.lm_head.weight
        head[len(tokenizer) :] = 50 * head[: 2 * 8 : 2]  # rows that are no tokens, but likely ones
        head[tokenizer.eos_token_id] *= 3
    prompts = [tokenizer(text)["input_ids"] for text in ("cat sat", "dog", "a red mat")] * 8
    answers = generate_token_ids(model, tokenizer, prompts, Sampling(30, do_sample=True, seed=1))
    eos = tokenizer.eos_token_id
    assert {len(answer) for answer in answers} != {30}
    for answer in answers:
        assert 1 <= len(answer) <= 30 and max(answer) < len(tokenizer)
        assert eos not in answer[:-1]
        assert (answer[-1] == eos) or len(answer) == 30


def test_the_sampling_temperature_sharpens_the_answers_until_they_are_greedy(
    tiny_pair: Pair,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])
    prompts = [tokenizer(f"say {word}")["input_ids"] for word in ("cat", "dog", "mat", "red")]
    greedy = generate_answers(model, tokenizer, prompts, Sampling(6))

    def at(temperature: float) -> list[str]:
        sampling = Sampling(6, do_sample=True, temperature=temperature, seed=1)
        rows = generate_token_ids(model, tokenizer, prompts, sampling)
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    assert at(1e-4) == greedy
    assert at(1.0) != greedy


def _answers(path: str, step: int) -> list[tuple[int, ...]]:
    """Returns prompt + answer of each row that the untrained student gives to a global batch."""
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.on_policy.rollout import answer_all
    from pocl_dist.pipeline.inputs import make_encoder, read_train

    config = load_config([path])
    rank = join_process_group(60)
    folder = str(config.models.student.path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = make_encoder(config, tokenizer)
    encoded = {row.example_id: encoder.encode(row) for row in read_train(config).examples}
    examples = first_batch(config, encoded)
    answers = answer_all(model, tokenizer, examples, config, step, rank, lambda: False)
    assert answers is not None
    assert [a.prompt_ids for a in answers] == [e.prompt_ids for e in examples]
    assert [a.example_id for a in answers] == [e.example_id for e in examples]
    is_cut = [answer.token_ids[-1] != tokenizer.eos_token_id for answer in answers]
    assert is_cut == [answer.is_response_cut for answer in answers]
    return [answer.token_ids[answer.num_prompt_tokens :] for answer in answers]


def first_batch(config: Config, encoded: dict[str, EncodedExample]) -> list[EncodedExample]:
    from pocl_dist.data.sampler import StageSampler

    plan = read_plan(RunDirectory(Path(config.run_dir)).plan)
    stage = plan.stages[0]
    sampler = StageSampler(
        config.seed, 0, stage.num_examples, stage.epochs, config.engine.global_batch_size
    )
    return [encoded[plan.ranking[position]] for position in sampler.batch(0)]


def planned(path: Path) -> tuple[Config, RunDirectory]:
    config = load_config([path])
    run = RunDirectory(Path(config.run_dir))
    make_plan(config, run)
    return config, run


def test_one_and_two_and_three_ranks_give_the_same_answers_and_every_step_others(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    # 3 ranks: two calls of 4 prompts, so the third has nothing to generate.
    policy = {"mode": "on", "batch_size": 4}
    path = write_config(tmp_path, *tiny_pair, policy=policy)
    planned(path)
    alone = run_ranks(_answers, 1, str(path), 0)[0]
    assert len(alone) == 8
    for world_size in (2, 3):
        assert run_ranks(_answers, world_size, str(path), 0) == [alone] * world_size
    assert run_ranks(_answers, 1, str(path), 1)[0] != alone


def test_ranks_that_hold_other_answers_compare_other_rows() -> None:
    rows = [example("a", 1, 2), example("b", 3)]
    others = [example("a", 1, 2), example("b", 4)]
    for source in (STUDENT, REPLAY):
        one, two = (AnsweredBatch(batch, source, 0.0).applied_rows() for batch in (rows, others))
        assert one != two


# ---------------------------------------------------------------------------------- whole trainings


@pytest.fixture(scope="module")
def adaptive(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Returns an uninterrupted run on two ranks that takes answers from all three sources."""
    run = distill(adaptive_config(tmp_path_factory.mktemp("adaptive"), tiny_pair), 2)
    shares = {(row["on_policy_share"], row["replay_share"]) for row in step_rows(run)}
    assert shares == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}
    return run


def _timeless(run: RunDirectory) -> list[dict]:
    rows = [row for row in read_json_lines(run.metrics) if row["kind"] in ("step", "dev", "stage")]
    return [{k: v for k, v in row.items() if k not in (*TIMES, "seconds")} for row in rows]


def test_steps_on_the_students_answers_use_the_divergence_alone(adaptive: RunDirectory) -> None:
    stages = read_plan(adaptive.plan).stages
    for row in step_rows(adaptive):
        if row["on_policy_share"]:
            assert row["kd_ratio"] == 1.0 and row["loss"] == row["kd_loss"]
        else:
            assert row["kd_ratio"] == stages[row["stage"]].kd_ratio
        num_rows = row["num_tokens"] / row["mean_answer_tokens"]
        assert num_rows == pytest.approx(round(num_rows)) and num_rows < 8.5


def test_phi_follows_the_dev_loss_and_is_told(adaptive: RunDirectory) -> None:
    rows = [row for row in read_json_lines(adaptive.metrics) if row["kind"] == "dev"]
    ratio, lowest = 0.7, rows[0]["dev_loss"]
    for row in rows[1:]:
        if row["dev_loss"] >= lowest:
            ratio, lowest = min(1.0, ratio + 0.1), row["dev_loss"]
        lowest = min(lowest, row["dev_loss"])
        assert row["on_policy_ratio"] == pytest.approx(ratio)
    assert 0.7 < ratio < 1.0


def _distill_signalled(path: str, at_call: int) -> None:
    """Trains; SIGTERM reaches rank 1 in the middle of its `at_call`th generation."""
    from pocl_dist.on_policy import rollout
    from pocl_dist.pipeline.distill import distill_rank

    generate, calls = rollout.generate_token_ids, []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == at_call and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args)

    rollout.generate_token_ids = interrupted
    config = load_config([path])
    distill_rank(config, RunDirectory(Path(config.run_dir)))


def test_a_run_stopped_while_it_generates_and_resumed_equals_the_uninterrupted_one(
    tiny_pair: Pair, adaptive: RunDirectory, tmp_path: Path
) -> None:
    path = adaptive_config(tmp_path, tiny_pair)
    _, run = planned(path)
    for _, error in run_ranks_with_errors(_distill_signalled, 2, str(path), 4):
        assert error[0] == "StoppedError"
    stopped_at = len(step_rows(run))
    whole = step_rows(adaptive)
    assert 0 < stopped_at < len(whole) and not run.export.exists()
    # Answers given before the stop are trained on after it: the buffer came back.
    assert any(row["replay_share"] for row in whole[stopped_at:])
    distill(path, 2)
    assert _timeless(run) == _timeless(adaptive)
    mine, theirs = checkpoint_tensors(run), checkpoint_tensors(adaptive)
    assert mine.keys() == theirs.keys() and "replay.token_ids_L" in mine
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    state, expected = (
        read_json(sorted(r.checkpoints.glob("step-*"))[-1] / "MANIFEST.json")["state"]
        for r in (run, adaptive)
    )
    assert state == expected and state["policy"]["num_replay_steps"] > 0


def test_a_run_resumed_on_another_number_of_ranks_goes_on_with_the_same_answers(
    tiny_pair: Pair, adaptive: RunDirectory, tmp_path: Path
) -> None:
    path = adaptive_config(tmp_path, tiny_pair)
    distill(path, 2, stop_after=6)
    run = distill(path, 1)
    mine, theirs = step_rows(run), step_rows(adaptive)
    for key in ("step", "num_tokens", "on_policy_share", "replay_share", "mean_answer_tokens"):
        assert [row[key] for row in mine] == [row[key] for row in theirs]
    losses, expected = (
        torch.tensor([[row["loss"], row["kl"]] for row in rows], dtype=torch.float64)
        for rows in (mine, theirs)
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-9)


def test_the_first_on_policy_loss_is_that_of_plain_torch_in_float64(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    # Loss temperature 1.7, sampling temperature 0.6: each where it belongs.
    path = write_config(
        tmp_path, *tiny_pair, policy={"mode": "on", "temperature": 0.6, "batch_size": 4},
        curriculum={"num_stages": 1, "epochs_per_stage": 0.3, "ordering": "shuffled",
                    "temperature": 1.7, "kd_ratio": 0.5},
    )  # fmt: skip
    config, _ = planned(path)
    answers = run_ranks(_answers, 1, str(path), 0)[0]
    row = step_rows(distill(path, 2))[0]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in tiny_pair[:2]
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])
    encoded = encode_all(config, tokenizer)
    total, count = 0.0, 0
    for item, answer in zip(first_batch(config, encoded), answers, strict=True):
        ids = torch.tensor([[*item.prompt_ids, *answer]])
        at = slice(item.num_prompt_tokens - 1, ids.shape[1] - 1)
        p, q = (
            torch.log_softmax(model(ids).logits[0, at, : len(tokenizer)] / 1.7, -1)
            for model in (teacher, student)
        )
        total, count = total + (p.exp() * (p - q)).sum().item() * 1.7**2, count + len(answer)
    assert row["num_tokens"] == count and row["kd_ratio"] == 1.0
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def encode_all(config: Config, tokenizer: object) -> dict[str, EncodedExample]:
    from pocl_dist.pipeline.inputs import make_encoder, read_train

    encoder = make_encoder(config, tokenizer)  # type: ignore[arg-type]
    return {row.example_id: encoder.encode(row) for row in read_train(config).examples}


def write_stopping_student(folder: Path) -> Path:
    """Writes a student that ends its answer at once after the token "!" and never else.

    Its layers add nothing, so the next token depends on the last one alone: the first coordinate
    of an embedding is that of eos in the head.
    """
    write_llama(folder, hidden=16, layers=2, seed=5, is_tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        ending = tokenizer("!")["input_ids"][-1]
        model.model.embed_tokens.weight[:, 0] = -2.0
        model.model.embed_tokens.weight[ending, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[ending] = 0.0
        model.lm_head.weight[ending, 0] = 10.0  # after another token as unlikely as eos
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 20.0
    model.save_pretrained(folder)
    return folder


def test_two_zero_3_ranks_whose_answers_differ_much_in_length_do_not_hang(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    student = write_stopping_student(tmp_path / "student")
    prompts = [f"a{'!' if index % 2 else ' cat sat on'}" for index in range(8)]
    lines = [
        json.dumps({"id": f"r{index}", "prompt": prompt, "response": "x"})
        for index, prompt in enumerate(prompts)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    path = write_config(
        tmp_path, tiny_pair[0], student, rows,
        policy={"mode": "on", "batch_size": 4, "max_new_tokens": 48},
        data={"template": "{prompt}", "max_tokens": 40, "max_prompt_tokens": 16},
        curriculum={"num_stages": 1, "epochs_per_stage": 3, "ordering": "shuffled"},
        optimizer={"learning_rate": 1e-6},
        engine={"zero_stage": 3, "micro_batch_size": 3, "global_batch_size": 8,
                "timeout_seconds": 60},
    )  # fmt: skip
    config, _ = planned(path)
    # Prompts that end in "!" are the shorter ones: they make up the first call, which is rank 0's.
    answers = run_ranks(_answers, 2, str(path), 0)[0]
    encoded = encode_all(config, AutoTokenizer.from_pretrained(student))
    for item, answer in zip(first_batch(config, encoded), answers, strict=True):
        is_short = int(item.example_id[1:]) % 2 == 1
        assert len(answer) == (1 if is_short else 40 - item.num_prompt_tokens)
    steps = step_rows(distill(path, 2))
    assert len(steps) == 3
    assert steps[0]["num_tokens"] == sum(map(len, answers))


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["policy.mode=on", "models.teacher="], "policy.mode: 'on' needs models.teacher"),
        (["policy.mode=adaptive"], "policy.mode: 'adaptive' needs data.dev"),
        (["policy.mode=adaptive", "data.dev=d", "policy.replay_buffer_size=7"],
         "policy.replay_buffer_size: 7 answers cannot fill a batch"),
        (["policy.mode=gkd"], "policy.mode: 'gkd' is not allowed"),
        (["policy.temperature=0"], "policy.temperature: 0"),
        (["policy.top_p=1.5"], "policy.top_p: 1.5"),
        (["policy.on_policy_ratio=-1"], "policy.on_policy_ratio: -1"),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_is_refused(tmp_path: Path, words: list[str], key: str) -> None:
    path = write_config(tmp_path, Path("t"), Path("s"), Path("r"))
    with pytest.raises(ConfigError) as caught:
        load_config([path], words)
    assert str(caught.value).startswith(key)


def test_a_policy_with_a_teacher_cache_is_refused(tmp_path: Path) -> None:
    cached = {"source": "cache_hidden"}
    where = (tmp_path, Path("t"), Path("s"), Path("r"))
    path = write_config(*where, policy={"mode": "mixed"}, teacher=cached)
    with pytest.raises(ConfigError, match=r"policy\.mode: .* teacher\.source 'cache_hidden'"):
        load_config([path])


def test_the_policy_is_part_of_what_a_resumed_run_must_share(tmp_path: Path) -> None:
    from pocl_dist.config import select_keys
    from pocl_dist.pipeline.inputs import RESULT_KEYS

    path = write_config(tmp_path, Path("t"), Path("s"), Path("r"), policy={"mode": "on"})
    keys = select_keys(load_config([path]), RESULT_KEYS)
    assert {f"policy.{name}" for name in PolicyConfig.model_fields} <= set(keys)
