"""Config sections of the passes over rows with Ray actors: answers, test sets, actors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pocl_dist.config.section import Section, Text


class GenerationConfig(Section):
    """Greedy answers: measure, dev metric, and evaluate unless it samples."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts per call. Part of the result's identity: another padding is another rounding."""


class EvaluateConfig(Section):
    """Answers on the test sets."""

    do_sample: bool = False
    """Sample instead of greedy; one pass per seed."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; not the temperature of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """6 as published; 0: off."""
    seeds: Annotated[list[int], Field(min_length=1)] = [10]
    """Seeds of the sampled passes; greedy needs one."""
    baselines: bool = False
    """Also evaluate the teacher and the student before training."""


class RayConfig(Section):
    """The actors of measure and evaluate."""

    address: Text | None = None
    """An existing cluster; null starts a local Ray with token authentication, without dashboard."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    """Model copies; null: one per GPU, or as many as the CPUs allow."""
    cpus_per_actor: Annotated[int, Field(ge=1)] = 1
    """Threads of each actor. Part of the result's identity on CPU."""
    shard_size: Annotated[int, Field(ge=1)] = 128
    """Rows per task, rounded up to whole batches: the unit that is saved and retried."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """No Ray or no actor after this long: exit code 69."""
