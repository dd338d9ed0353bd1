"""What is examined: config and options, and what earlier checks have found out for later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocl_dist.cluster.doctor.finding import SEE_ABOVE, Finding, SkipError
from pocl_dist.config import Config
from pocl_dist.data.encoding import Encoder
from pocl_dist.data.sources import Rows
from pocl_dist.models.header import ModelHeader
from pocl_dist.models.locate import Located
from pocl_dist.models.plain_tokenizer import PlainTokenizer

Role = Literal["teacher", "student"]
Probe = Callable[[Config], list[str]]
"""Asks a step itself (pipeline/probes.py): returns warnings, raises what the run would end with."""


@dataclass(frozen=True)
class Options:
    """What the command line says besides the config."""

    has_shape: bool = False  # nodes or GPUs were given: the run is for other machines than this
    with_gpu: bool = False  # GPUs must be here
    wait_seconds: float = 60.0  # for the other nodes of a job


@dataclass(frozen=True)
class Model:
    """A model of the config, as far as it can be read without its weights."""

    located: Located
    header: ModelHeader


@dataclass(frozen=True)
class Lengths:
    """Tokens of the training rows, over a sample of them."""

    num_sampled: int
    mean_label_tokens: float


@dataclass(frozen=True)
class Case:
    """One run that is to start. The dictionaries are filled by the checks that read."""

    config: Config
    options: Options
    probes: Mapping[str, Probe]
    scratch: Path  # removed at the end
    rows: dict[str, Rows] = field(default_factory=dict)  # by config key
    is_partial: dict[str, bool] = field(default_factory=dict)  # a source's first rows only
    models: dict[Role, Model] = field(default_factory=dict)
    tokenizers: dict[Role, PlainTokenizer] = field(default_factory=dict)
    encoders: list[Encoder] = field(default_factory=list)  # one, when the template can be used
    lengths: dict[str, Lengths] = field(default_factory=dict)  # by config key

    def model(self, role: Role) -> Model:
        """Returns a model that an earlier check has read; SkipError when it could not."""
        if role not in self.models:
            raise SkipError(f"models.{role} could not be read {SEE_ABOVE}")
        return self.models[role]

    def tokenizer(self, role: Role) -> PlainTokenizer:
        """Returns the tokenizer of a model; SkipError when it could not be read."""
        if role not in self.tokenizers:
            raise SkipError(f"the tokenizer of models.{role} could not be read {SEE_ABOVE}")
        return self.tokenizers[role]

    @property
    def trained_role(self) -> Role:
        """Returns whose tokenizer and shape the student has: a cut student the teacher's."""
        return "teacher" if self.config.models.student.path is None else "student"

    @property
    def existing_parent(self) -> Path:
        """Returns the run directory or the nearest folder above it that is there."""
        folder = Path(self.config.run_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        return folder


@dataclass(frozen=True)
class Check:
    """One row of the table in docs/doctor.md."""

    name: str
    group: str
    looks_at: str
    exit_codes: tuple[int, ...]  # that its errors can have
    function: Callable[[Case], Iterable[Finding]]
    why: str  # of its errors, unless a finding says another
    how: str
