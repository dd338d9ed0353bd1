"""What the train loop works with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from pocl_dist.config import Config
from pocl_dist.curriculum.coordinator import Coordinator
from pocl_dist.display.training import TrainingDisplay
from pocl_dist.distributed.checkpoint_write import CheckpointWriter
from pocl_dist.distributed.collectives import barrier
from pocl_dist.distributed.process_group import Rank
from pocl_dist.files import JSONValue, digest_of
from pocl_dist.on_policy.policy import OnPolicy
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.status import TrainingStatus
from pocl_dist.pipeline.student import StudentWithLoss
from pocl_dist.pipeline.train_rows import EncodedRows
from pocl_dist.records import EncodedExample, Example, Plan
from pocl_dist.run_log import MetricsLog
from pocl_dist.teacher.base import Teacher
from pocl_dist.trackers.sender import Trackers

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase

    from pocl_dist.models.sources import ModelFolder
    from pocl_dist.pipeline.save import SaveUnderWay


@dataclass
class Training:
    """What the loop works with; built once by `prepare.prepare_training`."""

    config: Config
    run: RunDirectory
    rank: Rank
    plan: Plan
    inputs: dict[str, JSONValue]  # config keys and digests that the result depends on
    examples: EncodedRows  # in the order of the ranking
    dev_rows: list[tuple[Example, EncodedExample]]
    quarters: list[list[tuple[Example, EncodedExample]]]  # training rows, easy to hard; or none
    student: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher | None
    engine: DeepSpeedEngine
    coordinator: Coordinator
    policy: OnPolicy | None  # None: the references are trained on
    writer: CheckpointWriter
    log: MetricsLog | None  # rank 0 writes, the others do not
    trackers: Trackers | None
    display: TrainingDisplay
    saved_at_seconds: float = field(default_factory=time.monotonic)
    save_under_way: SaveUnderWay | None = None
    has_told_interval: bool = False
    is_stop_asked: bool = False  # a signal to any rank, as the ranks told each other

    @property
    def module(self) -> StudentWithLoss:
        """Returns the trained module."""
        return cast("StudentWithLoss", self.engine.module)

    @property
    def run_digest(self) -> str:
        """Returns the digest of the inputs: a checkpoint with another is another run's."""
        return digest_of(self.inputs)

    def record(self, row: dict[str, object]) -> None:
        """Writes a line of `metrics.jsonl` and sends it to the trackers, on rank 0."""
        if self.log is None:
            return
        self.log.write(row)
        if self.trackers is not None:
            self.trackers.send(row)

    def tell_status(self) -> None:
        """Writes to `status.json` how far training is, on rank 0."""
        if not self.rank.is_main:
            return
        progress = self.coordinator.progress
        num_steps = sum(stage.num_steps for stage in self.plan.stages)
        status = TrainingStatus(
            progress.stage,
            progress.step,
            num_steps,
            progress.num_skipped,
            progress.num_overflows,
            progress.num_rewinds,
        )
        self.run.write_status("running", None, "distill", training=status)

    def close(self) -> None:
        """Closes the log and the trackers. Collective: who left first would have all ended."""
        if self.log is not None:
            self.log.close()
        if self.trackers is not None:
            self.trackers.close()
        barrier(self.rank)
