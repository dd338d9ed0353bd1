"""`estimate`: sizes against real models, formulas by hand, totals that are sums of their parts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pocl_dist import cli
from pocl_dist.cluster.estimate.arguments import Options
from pocl_dist.cluster.estimate.communication import (
    Cluster,
    all_gather_seconds,
    flat_ring_seconds,
    hierarchical_seconds,
    ring_seconds,
)
from pocl_dist.cluster.estimate.devices import DEVICES, Link
from pocl_dist.cluster.estimate.estimate import Estimate, make_estimate
from pocl_dist.cluster.estimate.fitting import best_fit, fits
from pocl_dist.cluster.estimate.inputs import make_setup
from pocl_dist.cluster.estimate.memory import PARTS, training_phases
from pocl_dist.cluster.estimate.model_files import header_parameters, parse_shape
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import shape_of
from pocl_dist.cluster.estimate.step_time import step_time
from pocl_dist.config import load_config
from pocl_dist.curriculum.stages import make_stages
from pocl_dist.errors import ConfigError, MissingInputError, UsageError
from tests.test_architectures import FAMILIES
from tests.test_imports import run
from tests.tiny import write_llama

BUNDLED = Path(__file__).parents[1] / "pocl_dist" / "bundled"
LLAMA_70B = (
    "model_type=llama,hidden_size=8192,num_hidden_layers=80,num_attention_heads=64,"
    "num_key_value_heads=8,intermediate_size=28672,vocab_size=128256,tie_word_embeddings=false"
)
LLAMA_8B = (
    "model_type=llama,hidden_size=4096,num_hidden_layers=32,num_attention_heads=32,"
    "num_key_value_heads=8,intermediate_size=14336,vocab_size=128256,tie_word_embeddings=false"
)
LARGE = Options(
    teacher=LLAMA_70B, student=LLAMA_8B, rows=10**7, tokens_per_row=800, response_tokens=400,
    nodes=8, gpus_per_node=8,
)  # fmt: skip
KEYS = (
    "run_dir=none", "models.teacher.path=a/b", "models.student.path=a/c", "data.train=none",
    "data.max_tokens=1024", "data.max_prompt_tokens=512", "engine.global_batch_size=512",
    "engine.micro_batch_size=2", "engine.gradient_checkpointing=true",
)  # fmt: skip


def setup_of(options: Options = LARGE, *keys: str) -> Setup:
    return make_setup([*KEYS, *keys], options)


# --------------------------------------------------------------------------------------- parameters


def real_config(config: PretrainedConfig) -> dict[str, object]:
    value: dict[str, object] = json.loads(config.to_json_string(use_diff=False))
    return value


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_promises_as_many_parameters_as_the_model_has(name: str) -> None:
    config = FAMILIES[name](16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(real_config(config), name)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        (LLAMA_70B, 70_553_706_496),
        (LLAMA_8B, 8_030_261_248),
        ("model_type=gpt2,n_embd=768,n_layer=12,n_head=12,vocab_size=50257,n_positions=1024",
         124_439_808),
    ],
)  # fmt: skip
def test_published_models_have_the_parameters_that_are_known(keys: str, count: int) -> None:
    assert parse_shape(keys, "teacher").num_parameters == count


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_headers_of_the_bundled_models_hold_what_their_config_promises(role: str) -> None:
    shape = parse_shape(str(BUNDLED / role), role)
    assert header_parameters(BUNDLED / role, shape.is_tied) == shape.num_parameters


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_is_counted_once_where_it_is_tied(tmp_path: Path, is_tied: bool) -> None:
    folder = write_llama(tmp_path / "model", 16, 2, 0, is_tied=is_tied)
    shape = parse_shape(str(folder), "student")
    assert header_parameters(folder, is_tied) == shape.num_parameters


def test_weights_that_are_not_of_the_config_are_told(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", 16, 2, 0)
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**value, "num_hidden_layers": 3}))
    options = Options(rows=10, tokens_per_row=10)
    with pytest.raises(ConfigError, match=r"models\.student\.path.*the headers .* hold"):
        make_setup([*KEYS[:1], "models.teacher=null", f"models.student.path={folder}",
                        "data.train=none"], options)  # fmt: skip


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(1, 2, 4, 12 / 64), (2, 2, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_zero_divides_what_the_paper_says_by_the_ranks(
    stage: int, parameters: float, gradients: float, optimizer: float
) -> None:
    setup = setup_of(LARGE, f"engine.zero_stage={stage}")
    parts, count = training_phases(setup)[-1].parts, 8_030_261_248
    assert parts["parameters"] == pytest.approx(parameters * count)
    assert parts["gradients"] == pytest.approx(gradients * count)
    assert parts["optimizer"] == pytest.approx(optimizer * count)


def test_the_teacher_is_shared_by_all_ranks() -> None:
    parts = training_phases(setup_of())[-1].parts
    assert parts["teacher"] == pytest.approx(2 * 70_553_706_496 / 64)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("source", ["online", "cache_hidden", "cache_topk"])
def test_more_devices_never_need_more_memory_per_rank(stage: int, source: str) -> None:
    setup = setup_of(LARGE, f"engine.zero_stage={stage}", f"teacher.source={source}")
    totals = [
        max(phase.total for phase in training_phases(setup.with_world(2**n))) for n in range(1, 10)
    ]
    assert all(after <= before for before, after in itertools.pairwise(totals))


def test_checkpointing_and_shorter_micro_batches_need_less() -> None:
    plain = setup_of(LARGE, "engine.gradient_checkpointing=false")
    less = [
        plain,
        plain.with_engine(micro_batch_size=1),
        setup_of().with_engine(micro_batch_size=1),
    ]
    totals = [max(phase.total for phase in training_phases(setup)) for setup in less]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3


def test_offloading_moves_bytes_to_the_host_and_loses_none() -> None:
    keys = ("engine.offload_optimizer=cpu", "engine.offload_param=cpu")
    plain, moved = training_phases(setup_of())[1], training_phases(setup_of(LARGE, *keys))[1]
    assert moved.host_total > 0
    assert moved.total + moved.host_total == plain.total


# ------------------------------------------------------------------------------------ communication


def test_a_ring_passes_on_all_parts_but_its_own() -> None:
    link = Link(bytes_per_second=100.0, latency_seconds=0.5)
    # 4 ranks, 400 bytes: 3 messages of 100 bytes: 3 * (0.5 + 1).
    assert ring_seconds(400, 4, link) == pytest.approx(4.5)
    assert ring_seconds(400, 1, link) == 0


def test_two_nodes_cross_the_network_once_per_part_and_device() -> None:
    cluster = Cluster(2, 2, Link(200.0, 0.0), Link(50.0, 1.0))
    # One ring: 3 steps of 100 bytes at min(200, 2 * 50); of them 1.5 wait for the network.
    assert flat_ring_seconds(400, cluster) == pytest.approx(3 + 1.5)
    # Each device's own half between the nodes: 1 * (1 + 100 / 50); within: 1 * 200 / 200.
    assert hierarchical_seconds(400, cluster) == pytest.approx(3 + 1)
    assert all_gather_seconds(400, cluster) == pytest.approx(4)


def test_one_rank_alone_communicates_nothing() -> None:
    setup = setup_of().with_world(1)
    assert step_time(setup.with_teacher(source="cache_topk")).communication == 0


# ---------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def large() -> Estimate:
    return make_estimate(setup_of())


def test_totals_are_the_sums_of_their_parts(large: Estimate) -> None:
    value = json.loads(json.dumps(large.to_json()))
    for phase in value["phases"] + value["passes"]:
        assert phase["total"] == sum(phase["parts"].values())
        assert set(phase["parts"]) <= set(PARTS)
    step = value["step_seconds"]
    assert step.pop("total") == pytest.approx(sum(step.values()))
    for stage in value["stages"]:
        assert stage["seconds"] * 64 / 3600 == pytest.approx(stage["device_hours"]["online"])


def test_the_cache_saves_the_teacher_s_forward_in_every_stage_but_the_first(
    large: Estimate,
) -> None:
    online = sum(stage.device_hours["online"] for stage in large.stages)
    cached = sum(stage.device_hours["cache_hidden"] for stage in large.stages)
    # 20 visits of every row online, one with the cache.
    saved = online - cached
    assert saved > 5 * large.caches["cache_hidden"].device_hours


def test_a_step_takes_the_operations_that_the_rule_of_thumb_says(large: Estimate) -> None:
    # 2 per teacher weight, 6 of the student and 2 more with checkpointing; attention, head besides.
    tokens = large.layout.num_tokens * 64
    expected = tokens * (2 * 70e9 + 8 * 8e9)
    assert large.step_flops == pytest.approx(expected, rel=0.1)


def test_stages_have_the_steps_of_the_plan() -> None:
    words = ["tiny_cpu.yaml"]
    config = load_config(words)
    found = make_estimate(make_setup(words, Options()))
    stages = make_stages(1600, config.curriculum, config.engine.global_batch_size)
    assert [stage.num_steps for stage in found.stages] == [stage.num_steps for stage in stages]
    assert [stage.num_examples for stage in found.stages] == [400, 800, 1200, 1600]


def test_the_suggestion_fits_and_none_that_fits_is_quicker() -> None:
    setup = setup_of()
    fit = best_fit(setup)
    assert fit is not None and fit.peak_bytes <= DEVICES["h100-80g"].usable_bytes
    for stage, size in itertools.product((1, 2, 3), (1, 2, 4, 8)):
        other = setup.with_engine(zero_stage=stage, micro_batch_size=size)
        assert not fits(other) or step_time(other).total >= fit.step_seconds * (1 - 1e-9)


# ------------------------------------------------------------------------------------- command line


def words_of(options: Options, *keys: str) -> list[str]:
    words: list[str] = []
    for name, value in vars(options).items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return ["estimate", *KEYS, *keys, *words]


def test_estimate_loads_no_heavy_package() -> None:
    assert run(*words_of(LARGE)) == [0, []]


def test_a_config_that_does_not_fit_is_64_and_says_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words_of(LARGE, "engine.zero_stage=1"), "--memory-gib", "40"])
    assert ended.value.code == 64
    printed = capsys.readouterr()
    assert "this fits: engine.zero_stage=" in printed.err
    assert "DOES NOT FIT" in printed.out


def test_where_nothing_fits_the_number_of_devices_that_does_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words_of(LARGE), "--memory-gib", "8"])
    assert ended.value.code == 64
    assert "nothing fits on up to 512 devices" in capsys.readouterr().err


def test_a_teacher_too_large_for_an_actor_is_64_and_says_how_many_devices_share_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words_of(LARGE, "teacher.source=cache_hidden"))
    assert ended.value.code == 64
    assert "this fits: teacher.devices_per_actor=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "per_node", "world", "expected"),
    [
        (None, None, None, (1, 1)),
        (None, None, 16, (2, 8)),
        (4, None, None, (4, 8)),
        (4, None, 16, (4, 4)),
        (None, 4, 16, (4, 4)),
        (2, 2, 16, (2, 2)),
    ],
)
def test_nodes_and_their_devices_come_from_options_then_from_the_config(
    nodes: int | None, per_node: int | None, world: int | None, expected: tuple[int, int]
) -> None:
    options = Options(**{**vars(LARGE), "nodes": nodes, "gpus_per_node": per_node})
    cluster = setup_of(options, f"engine.world_size={world or 'null'}").cluster
    assert (cluster.num_nodes, cluster.devices_per_node) == expected


@pytest.mark.parametrize(
    ("options", "keys", "error", "word"),
    [
        (Options(), (), MissingInputError, "models.teacher.path"),
        (Options(teacher=LLAMA_70B, student=LLAMA_8B), (), MissingInputError, "--rows"),
        (Options(device="h100"), (), MissingInputError, "models"),
        (Options(teacher="hidden_size=8"), (), ConfigError, "lacks num_attention_heads"),
        (Options(teacher="nothing"), (), MissingInputError, "--teacher: nothing does not exist"),
        (Options(teacher="model_type=mamba,hidden_size=8"), (), ConfigError, "mamba"),
        (Options(teacher=LLAMA_70B + ",num_local_experts=8"), (), ConfigError, "experts"),
        (Options(teacher=LLAMA_70B, student=LLAMA_8B, tokens_per_row=9), (), UsageError, "--rows"),
        (Options(nodes=3, gpus_per_node=1), (), ConfigError, "cannot be shared by"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    options: Options, keys: tuple[str, ...], error: type[Exception], word: str
) -> None:
    paths = ("models.teacher.path=/nowhere/teacher", "models.student.path=/nowhere/student")
    with pytest.raises(error) as raised:
        make_setup([*KEYS, *paths, *keys], options)
    assert word in str(raised.value)


def test_an_unknown_device_is_named_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match="one of cpu, a100-40g"):
        setup_of(Options(**{**vars(LARGE), "device": "tpu"}))


def test_a_hub_id_that_is_not_cached_and_cannot_be_fetched_is_69(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:  # HF_HUB_OFFLINE is set for all tests
        cli.main(["estimate", *KEYS, "models.teacher.path=nobody/has-this-model"])
    assert ended.value.code == 69
    assert "--teacher" in capsys.readouterr().err
