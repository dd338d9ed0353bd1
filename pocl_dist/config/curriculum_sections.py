"""Config sections of the curriculum: ranking, stages and what changes between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pocl_dist.config.section import Section


class ScheduleConfig(Section):
    """How a value goes over the stages."""

    schedule: Literal["linear", "cosine", "constant"]
    """Shape over the stages; `constant` stays at `start`."""
    start: float
    """Value of the first stage."""
    end: float | None = None
    """Value of the last stage; not used by `constant`."""


def _schedule_form(value: object) -> str | None:
    if isinstance(value, (dict, ScheduleConfig)):
        return "[schedule]"
    if isinstance(value, list):
        return "[table]"
    return "[number]" if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# The form is told apart first, so that a mistake in it gives one complaint and
# not one per alternative.
Schedule = Annotated[
    Annotated[ScheduleConfig, Tag("[schedule]")]
    | Annotated[list[float], Field(min_length=1), Tag("[table]")]
    | Annotated[float, Tag("[number]")],
    Discriminator(
        _schedule_form,
        custom_error_type="schedule_form",
        custom_error_message="must be a number, a list with one number per stage, "
        "or {schedule, start, end}",
    ),
]


class CurriculumConfig(Section):
    """Ranking, stages and what changes between them (POCL sections 3.1 and 3.2)."""

    num_stages: Annotated[int, Field(ge=1)] = 4
    """Parts of the ranking; 1 is plain distillation: T = 1, ratio 1, one cosine."""
    epochs_per_stage: Annotated[float, Field(gt=0)] = 8.0
    """Passes over a stage's examples; not used when `visits_per_example` is set."""
    visits_per_example: Annotated[float, Field(gt=0)] | None = None
    """Mean visits of an example over all stages; sets equal epochs (fractions allowed) for all."""
    temperature: Schedule = ScheduleConfig(schedule="linear", start=1.0, end=2.0)
    """A number, one value per stage, or a schedule."""
    kd_ratio: Schedule = ScheduleConfig(schedule="linear", start=0.7, end=1.0)
    """Share of the distillation loss; the rest is cross-entropy. As `temperature`."""
    ordering: Literal["curriculum", "shuffled", "reversed"] = "curriculum"
    """Easy to hard, or the two controls: random parts, hard to easy."""
    advance: Literal["fixed", "converged"] = "fixed"
    """`converged` ends a stage early when the dev metric has not improved `patience` times."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Dev evaluations without improvement that end a stage."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smaller gains of the dev metric do not count as improvement."""
    optimizer: Literal["reset", "keep"] = "reset"
    """AdamW moments at a stage change."""
    rrf_k: Annotated[float, Field(gt=0)] = 60.0
    """k of reciprocal rank fusion."""


class DevConfig(Section):
    """The dev metric during training."""

    metric: Literal["rouge_l", "loss"] = "rouge_l"
    """ROUGE-L of greedy answers (higher is better), or cross-entropy (lower is better)."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between dev evaluations, besides those at stage ends; null: at stage ends only."""
    quarter_rows: Annotated[int, Field(ge=0)] = 16
    """Training rows per difficulty quarter that are answered and scored before training and at each
    stage end, to show what is forgotten; 0: none. Costs 4 times as many greedy answers and forward
    passes, and meanwhile a copy of the student per rank, as the dev metric does."""

    @property
    def is_higher_better(self) -> bool:
        """Returns the direction of `metric`."""
        return self.metric == "rouge_l"
