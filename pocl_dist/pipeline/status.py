"""What `status.json` tells besides how a run ended: how far training is, and whose job it is."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from pocl_dist.files import JSONValue


@dataclass(frozen=True)
class TrainingStatus:
    """How far training is; None before it began."""

    stage: int | None = None
    step: int | None = None  # optimizer steps done, of `num_steps`
    num_steps: int | None = None
    num_skipped: int | None = None  # of them, because a loss or gradient was not finite
    num_overflows: int | None = None  # of them, because fp16 overflowed
    num_rewinds: int | None = None

    def to_json(self) -> dict[str, JSONValue]:
        """Returns the fields."""
        return asdict(self)

    @classmethod
    def from_status(cls, status: dict[str, JSONValue]) -> TrainingStatus:
        """Returns what an earlier status says."""
        known = {name: status.get(name) for name in cls.__dataclass_fields__}
        return cls(**known)  # type: ignore[arg-type]


def scheduler_ids() -> dict[str, JSONValue]:
    """Returns the ids by which a scheduler knows this job; empty outside of one."""
    names = {"slurm_job_id": "SLURM_JOB_ID", "slurm_restart_count": "SLURM_RESTART_COUNT"}
    if "KUBERNETES_SERVICE_HOST" in os.environ:  # elsewhere the host name is no pod's
        names["kubernetes_pod"] = "HOSTNAME"
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}
