"""Puts an estimate together: config and options -> setup -> memory, time, stages, what would fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pocl_dist.cluster.estimate.arguments import Options
from pocl_dist.cluster.estimate.communication import Cluster
from pocl_dist.cluster.estimate.cpu import cpu_device, with_flags
from pocl_dist.cluster.estimate.devices import DEVICES, Device
from pocl_dist.cluster.estimate.fitting import Fit, best_fit, fits
from pocl_dist.cluster.estimate.flops import step_work
from pocl_dist.cluster.estimate.memory import Phase, pass_phases, training_phases
from pocl_dist.cluster.estimate.model_files import parse_shape, student_shape, teacher_shape
from pocl_dist.cluster.estimate.passes import PassTime, measure_pass
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape
from pocl_dist.cluster.estimate.stages import Disk, StageCost, cache_passes, disk, stage_costs
from pocl_dist.cluster.estimate.step_time import StepTime, step_time
from pocl_dist.cluster.estimate.what_if import WORLDS, WhatIf, what_if
from pocl_dist.cluster.estimate.workload import (
    StepLayout,
    Workload,
    given_workload,
    read_workload,
)
from pocl_dist.config import Config, load_config
from pocl_dist.errors import ConfigError, UsageError

NOT_COUNTED = (
    "not counted: loading, checkpoints, dev answers, evaluate, report; and on GPUs nothing here was "
    "measured: figures are those of data sheets and the shares of them that are usually reached"
)


@dataclass(frozen=True)
class Estimate:
    """All that is printed; bytes, seconds, device-hours."""

    setup: Setup
    phases: tuple[Phase, ...]  # of distill
    passes: tuple[Phase, ...]  # of actors
    layout: StepLayout
    step: StepTime
    step_flops: float  # of all ranks
    stages: tuple[StageCost, ...]
    measure: PassTime | None
    caches: dict[str, PassTime]
    disk: Disk
    is_fitting: bool
    suggestion: Fit | None
    what_if: tuple[WhatIf, ...]

    @property
    def peak(self) -> Phase:
        """Returns the phase of distill that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    def to_json(self) -> dict[str, object]:
        """Returns what `--json` prints."""
        setup = self.setup
        return {
            "device": setup.device.name,
            "device_source": setup.device.source,
            "device_memory_bytes": setup.device.memory_bytes,
            "usable_bytes": setup.device.usable_bytes,
            "num_nodes": setup.cluster.num_nodes,
            "devices_per_node": setup.cluster.devices_per_node,
            "dtype": setup.dtype,
            "student_parameters": setup.student.num_parameters,
            "trained_parameters": setup.num_trained,
            "teacher_parameters": setup.teacher.num_parameters if setup.teacher else None,
            "num_rows": setup.workload.num_rows,
            "tokens_per_row": setup.workload.tokens_per_row,
            "labels_per_row": setup.workload.labels_per_row,
            "assumptions": [*setup.workload.assumptions, NOT_COUNTED],
            "phases": [_phase_json(phase) for phase in self.phases],
            "passes": [_phase_json(phase) for phase in self.passes],
            "peak_bytes": self.peak.total,
            "is_fitting": self.is_fitting,
            "layout": asdict(self.layout),
            "step_seconds": asdict(self.step) | {"total": self.step.total},
            "step_flops": self.step_flops,
            "stages": [asdict(stage) for stage in self.stages],
            "measure": asdict(self.measure) if self.measure else None,
            "cache_passes": {source: asdict(done) for source, done in self.caches.items()},
            "disk": asdict(self.disk),
            "suggestion": asdict(self.suggestion) if self.suggestion else None,
            "what_if": [asdict(row) for row in self.what_if],
        }


def _phase_json(phase: Phase) -> dict[str, object]:
    return {
        "name": phase.name,
        "parts": dict(phase.parts),
        "total": phase.total,
        "host": dict(phase.host),
    }


def make_estimate(setup: Setup) -> Estimate:
    """Returns the estimate of a setup."""
    layout = setup.layout
    return Estimate(
        setup=setup,
        phases=training_phases(setup),
        passes=pass_phases(setup),
        layout=layout,
        step=step_time(setup, layout),
        step_flops=step_work(setup, layout).flops * setup.world_size,
        stages=stage_costs(setup),
        measure=measure_pass(setup),
        caches=cache_passes(setup),
        disk=disk(setup),
        is_fitting=fits(setup),
        suggestion=best_fit(setup),
        what_if=what_if(setup),
    )


def make_setup(words: Sequence[str], overrides: Sequence[str], options: Options) -> Setup:
    """Returns what is estimated; loads neither torch nor weights.

    Raises ConfigError (64) for a config that is wrong or whose batch the ranks cannot share,
    MissingInputError (66) and UnavailableError (69) for models and rows that are not here.
    """
    config = load_config(words, overrides)
    nodes, per_node = _size(config, options)
    config = load_config(words, [*overrides, f"engine.world_size={nodes * per_node}"])
    teacher = _teacher(config, options)
    student = (
        student_shape(config, teacher)
        if options.student is None
        else parse_shape(options.student, "student")
    )
    workload = _workload(config, options)
    device = _device(config, options, student, workload, per_node)
    return Setup(
        config=config,
        student=student,
        teacher=teacher,
        workload=workload,
        device=device,
        cluster=Cluster(nodes, per_node, device.intra, device.inter),
    )


def _size(config: Config, options: Options) -> tuple[int, int]:
    """Returns nodes and devices of a node."""
    world = config.engine.world_size
    if options.nodes is None and options.gpus_per_node is None and world is not None:
        per_node = min(world, 8)
        if world % per_node:
            raise ConfigError(
                f"engine.world_size: {world} ranks are not whole nodes of {per_node}; "
                "give --nodes and --gpus-per-node"
            )
        return world // per_node, per_node
    alone = 1 if options.nodes is None or options.device == "cpu" else 8
    return options.nodes or 1, options.gpus_per_node or alone


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


def estimate(words: Sequence[str], overrides: Sequence[str], options: Options) -> None:
    """Prints the estimate; raises ConfigError (64) when the config does not fit the devices."""
    from pocl_dist.cluster.estimate.report import report

    found = make_estimate(make_setup(words, overrides, options))
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        print(report(found))
    sys.stdout.flush()
    if not found.is_fitting:
        raise ConfigError(_misfit(found))


def _misfit(found: Estimate) -> str:
    """Returns what does not fit, and what would."""
    setup, peak = found.setup, found.peak
    part = max(peak.parts, key=lambda name: peak.parts[name])
    line = (
        f"{setup.world_size} x {setup.device.name} are too small: {peak.name} needs "
        f"{peak.total / 2**30:.1f} GiB per rank ({part} {peak.parts[part] / 2**30:.1f}), "
        f"{setup.device.usable_bytes / 2**30:.1f} can be used"
    )
    if found.suggestion is not None:
        return f"{line}; this fits: {found.suggestion}"
    for world in WORLDS:
        if world <= setup.world_size or setup.config.engine.global_batch_size % world:
            continue
        other = best_fit(setup.with_world(world))
        if other is not None:
            return f"{line}; no ZeRO stage, offload or micro-batch does; {world} devices do: {other}"
    longest = setup.config.data.max_tokens
    return (
        f"{line}; nothing fits on up to {WORLDS[-1]} devices that can share a batch of "
        f"{setup.config.engine.global_batch_size}: a larger device, a shorter data.max_tokens "
        f"({longest}), or teacher.source: cache_hidden"
    )
