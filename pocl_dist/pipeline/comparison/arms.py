"""The arms of a comparison: each is the user's config with some keys changed. Loads no torch.

SFT and SeqKD need no divergence; every method has two arms, plain KD (T = 1, ratio 1, one cosine
over all rows) and KD + POCL (the config's own curriculum), which differ in `curriculum.*` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pocl_dist.config import Config, replaced
from pocl_dist.config.loss_names import LOSSES
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue

Keys = Mapping[str, JSONValue]

GKD = "gkd"
# On-policy GKD (arXiv 2306.13649) as the field runs it: in half of the steps (lambda 0.5) the
# student's own answers, drawn at T = 1 from the whole distribution, and the generalised JSD with
# beta 0.5; so do TRL's GKDTrainer by default and the GKD baseline released with DistiLLM. The
# teacher must see new answers, so it runs online.
_GKD_KEYS: Keys = MappingProxyType(
    {
        "loss.name": "jensen_shannon",
        "loss.kwargs": {"student_weight": 0.5},
        "policy.mode": "mixed",
        "policy.on_policy_ratio": 0.5,
        "policy.temperature": 1.0,
        "policy.top_p": 1.0,
        "teacher.source": "online",
    }
)
METHODS = (*LOSSES, GKD)


@dataclass(frozen=True)
class Arm:
    """One line of the table: its name is that of its folder, `keys` are set over the config's."""

    name: str
    kind: str  # "sft", "seqkd", "kd", "pocl", or "ablation"
    method: str | None
    keys: Keys = field(hash=False)

    def config(self, base: Config) -> Config:
        """Returns the arm's config, for any seed and learning rate; ConfigError names the arm."""
        try:
            return replaced(base, self.keys)
        except ConfigError as error:
            raise ConfigError(f"arm {self.name}: {error}") from error


def check_base(base: Config) -> None:
    """Raises ConfigError (64) for a config that has nothing to compare, a line per reason."""
    curriculum, problems = base.curriculum, []
    if base.models.teacher is None:
        problems.append("models.teacher: null, but all arms but SFT learn from a teacher")
    if not base.data.eval:
        problems.append("data.eval: names no test set, so there is nothing to compare on")
    if curriculum.num_stages == 1:
        problems.append("curriculum.num_stages: 1 is plain KD; the POCL arms need 2 or more")
    if curriculum.advance != "fixed":
        problems.append(
            "curriculum.advance: 'converged' ends stages early, so the sample visits of the arms "
            "would not be equal; use 'fixed'"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def method_keys(method: str, base: Config) -> dict[str, JSONValue]:
    """Returns the keys of a method; the config's own `loss.kwargs` belong to its `loss.name`."""
    if method == GKD:
        return dict(_GKD_KEYS)
    kwargs: dict[str, JSONValue] = {}
    if method == base.loss.name:
        kwargs = dict(base.loss.kwargs)
    return {"loss.name": method, "loss.kwargs": kwargs}


def one_stage_keys(visits_per_row: float) -> dict[str, JSONValue]:
    """Returns the keys of training without a curriculum: one stage, one cosine, T = 1, ratio 1."""
    return {
        "curriculum.num_stages": 1,
        "curriculum.visits_per_example": visits_per_row,
        "curriculum.ordering": "curriculum",
        "curriculum.temperature": 1.0,
        "curriculum.kd_ratio": 1.0,
    }


def _cross_entropy_keys(visits_per_row: float, responses: str) -> dict[str, JSONValue]:
    """Returns the keys of training on answers alone: no teacher is loaded (ratio 0)."""
    return {
        **one_stage_keys(visits_per_row),
        "curriculum.kd_ratio": 0.0,
        "data.responses": responses,
        "loss.name": "forward_kl",
        "loss.kwargs": {},
        "policy.mode": "off",
        "teacher.source": "online",
    }


@dataclass(frozen=True)
class RowCounts:
    """Rows that the kinds of arms train on; equal, unless rows had to be left out."""

    references: int
    generated: int  # rows with a usable answer of the teacher
    ranked: int  # rows with finite difficulty scores

    def of(self, config: Config) -> int:
        """Returns the rows of an arm's config."""
        if needs_difficulty(config):
            return self.ranked
        return self.generated if config.data.responses == "teacher" else self.references


def baselines(target_visits: int, counts: RowCounts) -> list[Arm]:
    """Returns SFT and SeqKD, each with as many sample visits as the curriculum has."""
    return [
        Arm(
            "sft", "sft", None, _cross_entropy_keys(target_visits / counts.references, "references")
        ),
        Arm(
            "seqkd", "seqkd", None, _cross_entropy_keys(target_visits / counts.generated, "teacher")
        ),
    ]


def pair_of(method: str, base: Config, target_visits: int, counts: RowCounts) -> tuple[Arm, Arm]:
    """Returns plain KD and KD + POCL of a method."""
    of_method = method_keys(method, base)
    is_generated = base.data.responses == "teacher"
    num_rows = counts.generated if is_generated else counts.references
    plain = of_method | one_stage_keys(target_visits / num_rows)
    return Arm(f"{method}-kd", "kd", method, plain), Arm(
        f"{method}-pocl", "pocl", method, of_method
    )
