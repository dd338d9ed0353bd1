"""Config sections of two job schedulers: Slurm, and the jobs interface of a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pocl_dist.config.section import Line, Section

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:=@%+|&/-]*$")]
TimeLimit = Annotated[
    str, StringConstraints(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$|^\d+$|^\d{1,4}:\d{2}$")
]
Option = Annotated[Line, StringConstraints(pattern=r"^--[a-z][a-z0-9-]*(=.*)?$")]
Mount = Annotated[Line, StringConstraints(pattern=r"^/[^,:]*:/[^,:]*(:r[ow])?$")]


class SlurmConfig(Section):
    """The jobs of `pocl-dist launch --target slurm`: one for each step, each on `launch.nodes`."""

    partition: Word | None = None
    """Null: the default partition."""
    cpu_partition: Word | None = None
    """For the steps of one process (plan, report), which ask for no GPU; null: `partition`."""
    account: Word | None = None
    """Null: the user's default."""
    qos: Word | None = None
    """Quality of service; null: the default."""
    constraint: Word | None = None
    """Features that nodes must have; null: any node."""
    time_limit: TimeLimit = "24:00:00"
    """Of one attempt of a step, [days-]hours:minutes:seconds; the job goes on in a new attempt."""
    exclusive: bool = True
    """Whole nodes. Otherwise set `cpus_per_node` and `memory`."""
    cpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each node; null: the default, with `exclusive` all."""
    memory: Word | None = None
    """Of each node, e.g. `400G`; `0`: all of it; null: the default."""
    gpu_type: Word | None = None
    """E.g. `h100`; null: any GPU."""
    extra_options: list[Option] = []
    """More options for sbatch, e.g. `--reservation=night`."""
    max_requeues: Annotated[int, Field(ge=0)] = 20
    """Restarts of a job, whoever asked for them, before it ends with its code and the chain too.
    Three attempts in a row that finish nothing end it at once."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What runs every command in `image`. The batch script, which needs Slurm's commands, is
    outside; the interpreter `launch.python` is the image's."""
    image: Line | None = None
    """Of the container: what `srun --container-image` or `apptainer exec` takes."""
    mounts: list[Mount] = []
    """`SOURCE:TARGET` for the container. The working folder and the run directory are mounted
    under their own names anyway; models and data elsewhere belong here."""


class RayJobConfig(Section):
    """The jobs of `pocl-dist launch --target ray`: steps sent to a Ray cluster that is there."""

    address: Line | None = None
    """Of its jobs interface, e.g. `http://127.0.0.1:8265`; null: RAY_API_SERVER_ADDRESS of the
    environment. The token comes from there too (RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN)."""
    poll_seconds: Annotated[int, Field(ge=1)] = 10
    """How often a job is asked how it stands."""
    max_resubmits: Annotated[int, Field(ge=0)] = 20
    """New attempts of a step that ended with a retryable code."""
