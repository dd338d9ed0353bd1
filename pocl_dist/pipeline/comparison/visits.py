"""Sample visits: how many an arm makes, and that all make as many. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocl_dist.config import Config
from pocl_dist.curriculum.stages import make_stages
from pocl_dist.data.sampler import num_visits
from pocl_dist.errors import ConfigError
from pocl_dist.records import Stage

MAX_VISIT_ERROR = 0.01
"""Arms are compared when their sample visits differ by no more than this share."""


def stages_of(config: Config, num_rows: int) -> tuple[Stage, ...]:
    """Returns the stages as `plan` will cut them."""
    return make_stages(num_rows, config.curriculum, config.engine.global_batch_size)


def visits_of(stages: Sequence[Stage]) -> int:
    """Returns the examples that all stages train on, each as often as it is visited."""
    return sum(num_visits(stage.num_examples, stage.epochs) for stage in stages)


def check_equal(visits_of_arm: Mapping[str, int], target: int) -> None:
    """Raises ConfigError (64) naming each arm that visits over 1 % more or fewer than `target`."""
    unequal = [
        f"{name} {visits} ({100 * (visits - target) / target:+.1f} %)"
        for name, visits in visits_of_arm.items()
        if abs(visits - target) > MAX_VISIT_ERROR * target
    ]
    if unequal:
        raise ConfigError(
            f"curriculum.visits_per_example: the curriculum makes {target} sample visits, but "
            f"{', '.join(unequal)}: more than {MAX_VISIT_ERROR:.0%} apart, and nothing was "
            "trained. Stages and epochs end at whole rows: use more rows or more visits"
        )
