"""Whether the machines of `launch` are those that the rest of the config needs."""

from __future__ import annotations

from pocl_dist.config.schema import Config
from pocl_dist.errors import ConfigError


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


def check_local(config: Config) -> None:
    """Raises ConfigError (64) when several nodes are asked of the launcher of one machine."""
    launch = config.launch
    if launch.nodes > 1 and config.engine.world_size is None:
        raise ConfigError(
            f"launch.nodes: {launch.nodes}, but launch.ranks_with 'local' starts ranks on this "
            "machine only; choose another, or `pocl-dist launch` for a job over the nodes"
        )
