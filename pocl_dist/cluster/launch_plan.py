"""What a job is: the config it runs with, its machines and steps. Looks at no path of this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pocl_dist.config import Config, dump_config, load_words
from pocl_dist.config.launch_checks import check_fits
from pocl_dist.config.steps import is_ranks_work, steps_of

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
