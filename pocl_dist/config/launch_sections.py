"""Config section of the machines: how many, how their ranks are started, what surrounds a job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pocl_dist.config.kubernetes_sections import KubernetesConfig
from pocl_dist.config.section import Line, Section, Text
from pocl_dist.config.slurm_sections import RayJobConfig, SlurmConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class LaunchConfig(Section):
    """Machines, ranks and jobs. Another value never changes a result (but for rounding)."""

    ranks_with: Literal["local", "deepspeed", "torchrun", "srun"] = "local"
    """What starts the ranks of distill: `local`: the deepspeed launcher on this machine;
    `deepspeed`: the same over `launch.hostfile` with ssh and pdsh; `torchrun`: rendezvous, started
    by hand on the other nodes; `srun`: inside a Slurm job. A file each in launch/."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines; not for `local`."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """Of each machine; 0: on the CPU."""
    ranks_per_node: Annotated[int, Field(ge=1)] | None = None
    """Null: one per GPU, or one on the CPU."""
    hostfile: Text | None = None
    """`deepspeed`: one `HOST slots=N` per line; slots are ranks."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] = 22
    """`deepspeed`: port of sshd on every host."""
    ssh_config: Text | None = None
    """`deepspeed`: file for `ssh -F`; null: that of the user."""
    dead_link_seconds: Annotated[int, Field(ge=2)] = 15
    """`deepspeed`: a host whose link is silent this long is lost (ssh keepalives)."""
    master_address: Line | None = None
    """Where rank 0 listens, as the other nodes call it; null: the first host of the hostfile, the
    first node of the Slurm job, or this machine when it is the only one."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] = 8476
    """Port of rank 0. Below the range that the system takes for outgoing connections."""
    join_seconds: Annotated[int, Field(ge=1)] = 900
    """`torchrun`: nodes wait this long for one another."""
    grace_seconds: Annotated[int, Field(ge=20)] = 300
    """From a warning (preemption, time limit) to the end: a step and a save must fit into it."""
    name: Name = "pocl"
    """Of the jobs."""
    folder: Line | None = None
    """Working folder on the cluster, from which relative paths count; null: where the job is
    submitted or started."""
    python: Line = "python"
    """Interpreter on the cluster that has pocl_dist."""
    setup: list[Line] = []
    """Shell lines before every command of a job: `module load cuda`, `source venv/bin/activate`."""
    environment: dict[Variable, Line] = {}
    """Variables of every command and rank. No secrets: the config is kept in the run directory."""
    k8s: KubernetesConfig = KubernetesConfig()
    """Of the target k8s."""
    slurm: SlurmConfig = SlurmConfig()
    ray_job: RayJobConfig = RayJobConfig()

    @property
    def num_ranks_per_node(self) -> int:
        """Returns the ranks of a machine."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def num_ranks(self) -> int:
        """Returns the ranks of all machines."""
        return self.nodes * self.num_ranks_per_node
