"""Config and command line -> the setup that is estimated. Loads neither torch nor weights."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.cluster.estimate.arguments import Options
from pocl_dist.cluster.estimate.communication import Cluster
from pocl_dist.cluster.estimate.cpu import cpu_device, with_flags
from pocl_dist.cluster.estimate.devices import DEVICES, Device
from pocl_dist.cluster.estimate.model_files import parse_shape, student_shape, teacher_shape
from pocl_dist.cluster.estimate.rows import given_workload, read_workload
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape
from pocl_dist.cluster.estimate.workload import Workload
from pocl_dist.config import Config, load_words
from pocl_dist.errors import ConfigError, UsageError


def make_setup(words: Sequence[str], options: Options) -> Setup:
    """Returns what is estimated; loads neither torch nor weights.

    Raises ConfigError (64) for a config that is wrong or whose batch the ranks cannot share,
    MissingInputError (66) and UnavailableError (69) for models and rows that are not here.
    """
    config = load_words(words)
    nodes, per_node = _size(config, options)
    config = load_words([*words, f"engine.world_size={nodes * per_node}"])
    teacher = _teacher(config, options)
    student = (
        student_shape(config, teacher)
        if options.student is None
        else parse_shape(options.student, "student")
    )
    workload = _workload(config, options)
    device = _device(config, options, student, workload, per_node)
    if config.engine.zero_stage == 0 and config.engine.dtype is None and not device.is_cpu:
        raise ConfigError(
            "engine.zero_stage: 0 trains in fp32 only, and engine.dtype null means bf16 on a GPU; "
            "use stage 1, 2 or 3"
        )
    return Setup(
        config=config,
        student=student,
        teacher=teacher,
        workload=workload,
        device=device,
        cluster=Cluster(nodes, per_node, device.intra, device.inter),
        node_size=options.gpus_per_node or device.devices_per_node,
    )


def _size(config: Config, options: Options) -> tuple[int, int]:
    """Returns nodes and devices of a node."""
    world = config.engine.world_size
    if options.nodes is None and options.gpus_per_node is None and world is not None:
        usual = min(world, 8)
        if world % usual:
            raise ConfigError(
                f"engine.world_size: {world} ranks are not whole nodes of {usual}; "
                "give --nodes and --gpus-per-node"
            )
        return world // usual, usual
    nodes, per_node = options.nodes, options.gpus_per_node
    if nodes is None and per_node is not None and world is not None and world % per_node == 0:
        return world // per_node, per_node
    if per_node is None and nodes is not None and world is not None and world % nodes == 0:
        return nodes, world // nodes
    alone = 1 if nodes is None or options.device == "cpu" else 8
    return nodes or 1, per_node or alone


def _teacher(config: Config, options: Options) -> ModelShape | None:
    if options.teacher is None:
        return teacher_shape(config)
    if config.models.teacher is None:
        raise UsageError("--teacher: models.teacher of the config is null (SFT)")
    return parse_shape(options.teacher, "teacher")


def _workload(config: Config, options: Options) -> Workload:
    if options.tokens_per_row is None:
        if options.response_tokens is not None:
            raise UsageError("--response-tokens: needs --tokens-per-row")
        return read_workload(config, options.rows)
    if options.rows is None:
        raise UsageError("--tokens-per-row: needs --rows")
    return given_workload(config, options.rows, options.tokens_per_row, options.response_tokens)


def _device(
    config: Config, options: Options, student: ModelShape, workload: Workload, per_node: int
) -> Device:
    if options.device == "cpu":
        tokens = int(config.engine.micro_batch_size * workload.tokens_per_row)
        device = cpu_device(per_node, options.flops, max(tokens, 16), student.hidden, student.ffn)
    elif options.device in DEVICES:
        device = DEVICES[options.device]
    else:
        raise UsageError(
            f"--device: {options.device!r} is not allowed: one of cpu, {', '.join(DEVICES)}"
        )
    return with_flags(
        device,
        flops=options.flops,
        memory_gib=options.memory_gib,
        intra_gb_per_s=options.intra_bandwidth,
        inter_gb_per_s=options.inter_bandwidth,
    )
