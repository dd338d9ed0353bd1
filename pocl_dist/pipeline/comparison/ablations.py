"""The controls of `--ablate`: what of the curriculum makes the difference? Loads no torch.

Each gives arms per method, as the method's plain KD or its KD + POCL with some keys changed.
A control that is the same config as an arm that is there already is not trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pocl_dist.config import Config
from pocl_dist.config.curriculum_sections import Schedule
from pocl_dist.curriculum.schedules import stage_values
from pocl_dist.files import JSONValue
from pocl_dist.pipeline.comparison.arms import Arm, Keys, RowCounts
from pocl_dist.pipeline.comparison.visits import stages_of

STAGE_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """What an ablation starts from."""

    base: Config
    plain: Arm
    pocl: Arm
    target_visits: int
    counts: RowCounts


Variant = tuple[str, Arm, Keys]
"""Its name, the arm it is made from, the keys that are changed."""


def _last(schedule: Schedule, num_stages: int) -> float:
    return stage_values(schedule, num_stages)[-1]


def restart_steps(case: Case) -> list[int]:
    """Returns the steps before which the curriculum begins a stage, the first left out."""
    stages = stages_of(case.pocl.config(case.base), case.counts.ranked)
    ends = [sum(stage.num_steps for stage in stages[: index + 1]) for index in range(len(stages))]
    return ends[:-1]


def _restarts(case: Case) -> Iterator[Variant]:
    # The same batches as plain KD, the learning rate (and the optimizer) as POCL.
    steps: list[JSONValue] = list(restart_steps(case))
    yield "restarts", case.plain, {"optimizer.restart_steps": steps}


def _order(case: Case) -> Iterator[Variant]:
    for ordering in ("shuffled", "reversed"):
        keys: dict[str, JSONValue] = {"curriculum.ordering": ordering}
        if ordering == "shuffled" and case.counts.ranked != case.counts.references:
            # It needs no scores, so it leaves out no row.
            keys["curriculum.visits_per_example"] = case.target_visits / case.counts.references
        yield ordering, case.pocl, keys


def _temperature(case: Case) -> Iterator[Variant]:
    curriculum = case.base.curriculum
    end = _last(curriculum.temperature, curriculum.num_stages)
    for value in dict.fromkeys((1.0, end)):
        yield f"temperature-{value:g}", case.pocl, {"curriculum.temperature": value}


def _ratio(case: Case) -> Iterator[Variant]:
    yield "ratio-1", case.pocl, {"curriculum.kd_ratio": 1.0}


def _stages(case: Case) -> Iterator[Variant]:
    for num_stages in STAGE_COUNTS:
        if num_stages == 1:
            yield "stages-1", case.plain, {}
        elif num_stages == case.base.curriculum.num_stages:
            yield f"stages-{num_stages}", case.pocl, {}
        else:
            keys: dict[str, JSONValue] = {
                "curriculum.num_stages": num_stages,
                "curriculum.visits_per_example": case.target_visits / case.counts.ranked,
            }
            yield f"stages-{num_stages}", case.pocl, keys


def _optimizer(case: Case) -> Iterator[Variant]:
    for value in ("reset", "keep"):
        yield f"optimizer-{value}", case.pocl, {"curriculum.optimizer": value}


ABLATIONS: Mapping[str, Callable[[Case], Iterator[Variant]]] = MappingProxyType(
    {
        "restarts": _restarts,
        "order": _order,
        "temperature": _temperature,
        "ratio": _ratio,
        "stages": _stages,
        "optimizer": _optimizer,
    }
)


@dataclass(frozen=True)
class AblationRow:
    """A line of the ablation table: the arm may be one that several lines share."""

    method: str
    ablation: str
    variant: str
    arm: str


def add_ablations(
    names: Sequence[str], cases: Sequence[Case], arms: Sequence[Arm]
) -> tuple[list[Arm], list[AblationRow]]:
    """Returns all arms, those of the ablations behind the others, and the lines of their table."""
    found, rows = list(arms), []
    for case in cases:
        known = [(arm.config(case.base), arm.name) for arm in (case.plain, case.pocl)]
        for ablation in names:
            for variant, start, changes in ABLATIONS[ablation](case):
                arm = Arm(
                    f"{case.pocl.method}-{start.kind}-{variant}",
                    "ablation",
                    case.pocl.method,
                    {**start.keys, **changes},
                )
                config = arm.config(case.base)
                same = next((name for other, name in known if other == config), None)
                if same is None:
                    found.append(arm)
                    known.append((config, arm.name))
                    same = arm.name
                rows.append(AblationRow(str(case.pocl.method), ablation, variant, same))
    return found, rows
