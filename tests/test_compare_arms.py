"""The arms of a comparison: what differs, what does not, and that all visit as many examples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pocl_dist.config import Config, flatten, load_config, replaced
from pocl_dist.config.loss_names import LOSSES
from pocl_dist.curriculum.coordinator import Action, Coordinator
from pocl_dist.curriculum.schedules import step_in_cosine
from pocl_dist.curriculum.stages import order
from pocl_dist.data.sampler import StageSampler
from pocl_dist.errors import ConfigError, DataError
from pocl_dist.pipeline.compare import arms_of, check_before
from pocl_dist.pipeline.comparison.ablations import ABLATIONS
from pocl_dist.pipeline.comparison.arms import METHODS, RowCounts
from pocl_dist.pipeline.comparison.request import CompareRequest
from pocl_dist.pipeline.comparison.visits import stages_of
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Stage
from tests.tiny import results_in, write_config, write_rows

ALL = CompareRequest(METHODS, (1,), ablate=tuple(ABLATIONS))


def base(folder: Path, num_rows: int = 97, **curriculum: object) -> Config:
    rows = write_rows(folder / "train.jsonl", num_rows)
    defaults = {"num_stages": 4, "visits_per_example": 5, "ordering": "curriculum"}
    path = write_config(
        folder, folder / "teacher", folder / "student", rows,
        data={"eval": [str(rows)], "dev": str(rows)}, curriculum={**defaults, **curriculum},
    )  # fmt: skip
    return load_config([path])


def arms(config: Config, request: CompareRequest, counts: RowCounts) -> dict[str, Config]:
    return {arm.name: arm.config(config) for arm in arms_of(config, request, counts)[0]}


def count_visits(config: Config, stages: tuple[Stage, ...]) -> int:
    """Counts the examples of every batch, as training draws them."""
    size = config.engine.global_batch_size
    total = 0
    for stage in stages:
        sampler = StageSampler(config.seed, stage.index, stage.num_examples, stage.epochs, size)
        total += sum(len(sampler.batch(step)) for step in range(stage.num_steps))
    return total


@pytest.mark.parametrize("counts", [RowCounts(397, 397, 397), RowCounts(397, 390, 388)])
@pytest.mark.parametrize(
    "curriculum",
    [
        {},
        {"visits_per_example": 3.3},
        {"num_stages": 3, "temperature": 1.0},
        {"visits_per_example": None, "epochs_per_stage": 2.0},
    ],
)
def test_every_arm_visits_as_many_examples_as_the_curriculum(
    tmp_path: Path, counts: RowCounts, curriculum: dict[str, object]
) -> None:
    config = base(tmp_path, num_rows=397, **curriculum)
    request = CompareRequest(("reverse_kl", "gkd"), (1,), ablate=tuple(ABLATIONS))
    found = arms(config, request, counts)
    target = count_visits(config, stages_of(config, counts.ranked))
    for arm in found.values():
        visits = count_visits(arm, stages_of(arm, counts.of(arm)))
        assert abs(visits - target) <= 0.01 * target
    check_before(config, request)


def test_the_two_arms_of_a_method_differ_in_the_curriculum_alone(tmp_path: Path) -> None:
    found = arms(base(tmp_path), ALL, RowCounts(97, 97, 97))
    for method in METHODS:
        plain, pocl = (
            flatten(found[f"{method}-{kind}"].model_dump(mode="json")) for kind in ("kd", "pocl")
        )
        differing = {key for key in {*plain, *pocl} if plain.get(key) != pocl.get(key)}
        assert differing and all(key.startswith("curriculum.") for key in differing)
        assert (plain["curriculum.num_stages"], pocl["curriculum.num_stages"]) == (1, 4)
    (stage,) = stages_of(found["forward_kl-kd"], 97)
    assert (stage.temperature, stage.kd_ratio) == (1.0, 1.0)


def test_a_method_has_its_own_loss_and_the_config_s_arguments_only_for_the_config_s_loss(
    tmp_path: Path,
) -> None:
    config = replaced(
        base(tmp_path), {"loss.name": "skew_forward_kl", "loss.kwargs": {"skew": 0.3}}
    )
    found = arms(config, ALL, RowCounts(97, 97, 97))
    assert found["skew_forward_kl-pocl"].loss.kwargs == {"skew": 0.3}
    for name in LOSSES:
        assert found[f"{name}-kd"].loss.name == name
        assert found[f"{name}-kd"].loss.kwargs == ({"skew": 0.3} if "skew_f" in name else {})
        assert found[f"{name}-kd"].policy.mode == "off"
    gkd = found["gkd-pocl"]
    assert (gkd.loss.name, gkd.loss.kwargs) == ("jensen_shannon", {"student_weight": 0.5})
    assert (gkd.policy.mode, gkd.policy.on_policy_ratio) == ("mixed", 0.5)


def test_sft_and_seqkd_ask_no_teacher_while_they_train(tmp_path: Path) -> None:
    config = replaced(base(tmp_path), {"policy.mode": "mixed", "data.responses": "teacher"})
    found = arms(config, CompareRequest(("forward_kl",), (1,)), RowCounts(97, 97, 97))
    assert list(found) == ["sft", "seqkd", "forward_kl-kd", "forward_kl-pocl"]
    for name, responses in (("sft", "references"), ("seqkd", "teacher")):
        assert [stage.kd_ratio for stage in stages_of(found[name], 97)] == [0.0]
        assert (found[name].data.responses, found[name].policy.mode) == (responses, "off")


# --------------------------------------------------------------------------------------- ablations


def learning_rates(config: Config, num_rows: int, rank: object) -> list[tuple[float, bool]]:
    """Returns (learning rate, whether AdamW starts anew) of every step, as rank 0 says."""
    coordinator = Coordinator(stages_of(config, num_rows), config, rank, has_dev=False)  # type: ignore
    seen = []
    while True:
        instruction = coordinator.next_instruction(False, False)
        if instruction.action == Action.FINISH:
            return seen
        if instruction.action == Action.SAVE:
            coordinator.record_save()
        else:
            seen.append((instruction.learning_rate, instruction.resets_optimizer))
            coordinator.record_step()


@pytest.mark.parametrize("optimizer", ["reset", "keep"])
def test_restarts_have_the_learning_rate_of_the_curriculum_at_every_step(
    tmp_path: Path, gloo_rank: object, optimizer: str
) -> None:
    config = base(tmp_path, num_rows=96, visits_per_example=10, optimizer=optimizer)
    request = CompareRequest(("forward_kl",), (1,), ablate=("restarts",))
    found = arms(config, request, RowCounts(96, 96, 96))
    control, pocl = found["forward_kl-kd-restarts"], found["forward_kl-pocl"]
    sizes = [12, 24, 36, 48]  # steps: 24, 48, 72, 96 rows, 4 epochs each, batches of 8
    assert [stage.num_steps for stage in stages_of(pocl, 96)] == sizes
    assert control.optimizer.restart_steps == [12, 36, 72]
    of_control = learning_rates(control, 96, gloo_rank)
    assert of_control == learning_rates(pocl, 96, gloo_rank)
    low, high = config.optimizer.min_learning_rate, config.optimizer.learning_rate
    by_hand = [
        low + (high - low) * (1 + math.cos(math.pi * step / size)) / 2
        for size in sizes
        for step in range(size)
    ]
    assert [rate for rate, _ in of_control] == pytest.approx(by_hand, rel=1e-12)
    resets = [step for step, (_, is_reset) in enumerate(of_control) if is_reset]
    assert resets == ([12, 36, 72] if optimizer == "reset" else [])
    # All rows, at temperature 1 and ratio 1: plain KD but for the restarts.
    plain = found["forward_kl-kd"]
    assert stages_of(control, 96) == stages_of(plain, 96)
    assert replaced(control, {"optimizer.restart_steps": []}) == plain


def test_a_cosine_without_restarts_is_that_of_the_whole_stage() -> None:
    assert [step_in_cosine(step, 9, []) for step in (0, 4, 9)] == [(0, 9), (4, 9), (9, 9)]
    assert [step_in_cosine(step, 9, [3, 5]) for step in (2, 3, 4, 5, 8)] == [
        (2, 3), (0, 2), (1, 2), (0, 4), (3, 4),
    ]  # fmt: skip


def test_a_restart_that_cannot_happen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.restart_steps: \[3\] needs .*num_stages 1"):
        replaced(base(tmp_path), {"optimizer.restart_steps": [3]})
    plain = {"curriculum.num_stages": 1}
    with pytest.raises(ConfigError, match=r"optimizer\.restart_steps: \[3, 3\] must ascend"):
        replaced(base(tmp_path), {**plain, "optimizer.restart_steps": [3, 3]})
    late = replaced(base(tmp_path), {**plain, "optimizer.restart_steps": [3, 61]})
    with pytest.raises(ConfigError, match=r"\[61\] are not reached: the stage has 61 steps"):
        make_plan(late, RunDirectory(Path(late.run_dir)))


def test_shuffled_stages_have_the_same_sizes_and_members_by_chance(tmp_path: Path) -> None:
    request = CompareRequest(("forward_kl",), (1,), ablate=("order",))
    found = arms(base(tmp_path, num_rows=400), request, RowCounts(400, 400, 400))
    shuffled, pocl = found["forward_kl-pocl-shuffled"], found["forward_kl-pocl"]
    assert stages_of(shuffled, 400) == stages_of(pocl, 400)
    assert replaced(shuffled, {"curriculum.ordering": "curriculum"}) == pocl
    ids = [f"row-{index}" for index in range(400)]
    overlaps = [len(set(order(ids, "shuffled", seed)[:100]) & set(ids[:100])) for seed in range(40)]
    # Hypergeometric: 25 of the 100 easiest are expected, with a standard deviation of 3.8.
    assert abs(sum(overlaps) / 40 - 25) < 4 * 3.8 / math.sqrt(40)
    assert len(set(overlaps)) > 5


def test_a_control_that_equals_an_arm_is_not_trained_twice(tmp_path: Path) -> None:
    request = CompareRequest(
        ("forward_kl",), (1,), ablate=("temperature", "stages", "optimizer", "ratio")
    )
    config = base(tmp_path, temperature=1.0)
    found, rows, _ = arms_of(config, request, RowCounts(97, 97, 97))
    arm_of = {row.variant: row.arm for row in rows}
    assert arm_of["stages-1"] == "forward_kl-kd"
    for same in ("stages-4", "temperature-1", "optimizer-reset"):
        assert arm_of[same] == "forward_kl-pocl"
    trained = [arm.name for arm in found if arm.kind == "ablation"]
    assert trained == [
        f"forward_kl-pocl-{name}" for name in ("stages-2", "stages-8", "optimizer-keep", "ratio-1")
    ]
    configs = [arm.config(config) for arm in found]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


# --------------------------------------------------------------------------------------- refusals

PLAIN = CompareRequest(("forward_kl",), (1,))
STAGES = CompareRequest(("forward_kl",), (1,), ablate=("stages",))
REFUSED = {
    "models.teacher: null": ({"models.teacher": None}, PLAIN),
    "data.eval: names no test set": ({"data.eval": []}, PLAIN),
    "curriculum.num_stages: 1 is plain KD": ({"curriculum.num_stages": 1}, PLAIN),
    "curriculum.advance: 'converged' ends": (
        {"curriculum.advance": "converged", "dev.every": 1},
        PLAIN,
    ),
    "--lr-grid: 2 learning rates need data.dev": (
        {"data.dev": None},
        CompareRequest(("forward_kl",), (1,), (1e-4, 1e-3)),
    ),
    r"optimizer.min_learning_rate: 1e-07 is above optimizer.learning_rate 1e-08": (
        {},
        CompareRequest(("forward_kl",), (1,), (1e-8, 1e-3)),
    ),
    "arm forward_kl-pocl-stages-2: curriculum.temperature: .* has 4 values for 2 stages": (
        {"curriculum.temperature": [1.0, 1.1, 1.2, 1.3]},
        STAGES,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, message: str
) -> None:
    keys, request = REFUSED[message]
    config = replaced(base(tmp_path), keys)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as caught:
        check_before(config, request)
    assert caught.value.exit_code == 64
    assert not results_in(Path(config.run_dir))


def test_unequal_visits_are_refused_with_both_numbers(tmp_path: Path) -> None:
    config = base(tmp_path, num_rows=9, visits_per_example=0.5)
    # By hand, 4.5 visits. Four stages of 2, 4, 6, 9 rows: 0.43, 0.86, 1.29, 1.93 visits, each
    # rounded up: 6, which all arms are to make. Eight of 1 to 7 and 9 rows: 6 / 37 of each, rounded
    # up: 6 + 2 + 2.
    with pytest.raises(
        ConfigError, match=r"makes 6 sample .*-stages-8 10 \(\+66\.7 %\): more than 1%"
    ):
        check_before(config, STAGES)


def test_a_test_set_that_is_named_as_the_average_column_is_refused(tmp_path: Path) -> None:
    sets = [str(write_rows(tmp_path / f"{name}.jsonl", 2)) for name in ("average", "other")]
    with pytest.raises(ConfigError, match="a test set named 'average' would be taken"):
        check_before(replaced(base(tmp_path), {"data.eval": sets}), PLAIN)
    check_before(replaced(base(tmp_path), {"data.eval": sets[:1]}), PLAIN)


def test_fewer_rows_than_an_ablation_has_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 rows cannot fill"):
        check_before(base(tmp_path, num_rows=6), STAGES)
