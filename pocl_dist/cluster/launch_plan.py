"""What a job is: the config it runs with, its machines and steps. Looks at no path of this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pocl_dist.config import Config, dump_config, load_words
from pocl_dist.config.steps import is_ranks_work, steps_of
from pocl_dist.errors import ConfigError

FOLDER = "launch"
"""Where in the run directory the files of a submitted job lie."""


@dataclass(frozen=True)
class LaunchPlan:
    """A run as its job files see it. Paths are those of the cluster, as text."""

    config: Config
    steps: tuple[str, ...]
    folder: PurePosixPath
    """Where the rendered files will lie, as a job finds them from its working folder."""

    @property
    def nodes(self) -> int:
        """Returns the number of machines."""
        return self.config.launch.nodes

    @property
    def gpus_per_node(self) -> int:
        """Returns the GPUs of a machine; 0 on the CPU."""
        return self.config.launch.gpus_per_node

    @property
    def ranks_per_node(self) -> int:
        """Returns the ranks of a machine."""
        return self.config.launch.num_ranks_per_node

    @property
    def num_ranks(self) -> int:
        """Returns the ranks of all machines."""
        return self.config.launch.num_ranks

    @property
    def name(self) -> str:
        """Returns the name of the jobs."""
        return self.config.launch.name

    @property
    def run_dir(self) -> str:
        """Returns the run directory, as a job finds it from its working folder."""
        return self.config.run_dir

    def path(self, name: str) -> str:
        """Returns a rendered file as a job finds it from its working folder."""
        return str(self.folder / name)

    def is_ranks_work(self, step: str) -> bool:
        """Returns whether the step runs as ranks on all machines (else as one process, and Ray)."""
        return is_ranks_work(step, self.config)

    def config_yaml(self, ranks_with: str, ray_address: str | None = None) -> str:
        """Returns the merged config that lies beside the scripts.

        The number of ranks stands in it, so that a launcher that starts fewer is refused.
        `ray_address` replaces `ray.address` when it is given.
        """
        config = self.config
        launch = config.launch.model_copy(update={"ranks_with": ranks_with})
        engine = config.engine.model_copy(update={"world_size": self.num_ranks})
        update: dict[str, object] = {"launch": launch, "engine": engine}
        if ray_address is not None:
            update["ray"] = config.ray.model_copy(update={"address": ray_address})
        return dump_config(config.model_copy(update=update))


def make_plan(words: Sequence[str], folder: str | None = None) -> LaunchPlan:
    """Returns the plan of a command line's config; raises ConfigError (64) when it does not fit.

    `folder`: where the files will lie; None: RUN/launch.
    """
    config = load_words(words)
    check_fits(config)
    where = PurePosixPath(folder or PurePosixPath(config.run_dir) / FOLDER)
    return LaunchPlan(config, tuple(steps_of(config)), where)


def check_fits(config: Config) -> None:
    """Raises ConfigError (64) when the machines are not those that the rest of the config needs."""
    launch, engine = config.launch, config.engine
    shape = (
        f"launch.nodes {launch.nodes} x {launch.num_ranks_per_node} ranks per node "
        f"(launch.ranks_per_node, else launch.gpus_per_node) = {launch.num_ranks} ranks"
    )
    if engine.world_size not in (None, launch.num_ranks):
        raise ConfigError(
            f"engine.world_size: {engine.world_size}, but {shape}; change one, "
            "or set engine.world_size=null"
        )
    if engine.global_batch_size % launch.num_ranks:
        raise ConfigError(
            f"engine.global_batch_size: {engine.global_batch_size} rows cannot be shared by {shape}"
        )
    if 0 < launch.gpus_per_node < launch.num_ranks_per_node:
        raise ConfigError(
            f"launch.ranks_per_node: {launch.num_ranks_per_node} ranks for "
            f"launch.gpus_per_node {launch.gpus_per_node}: every rank needs a GPU"
        )
    if launch.gpus_per_node == 0 and engine.dtype == "fp16":
        raise ConfigError(
            "engine.dtype: 'fp16' is not possible with launch.gpus_per_node 0 (CPU): "
            "use fp32 or bf16"
        )
    if launch.gpus_per_node and engine.zero_stage == 0 and engine.dtype is None:
        raise ConfigError(
            "engine.zero_stage: 0 trains in fp32 only, and engine.dtype null means bf16 on a GPU; "
            "set engine.dtype: fp32, or stage 1, 2 or 3"
        )
