"""Puts an estimate together: memory, time, stages, what would fit, what if."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pocl_dist.cluster.estimate.arguments import Options
from pocl_dist.cluster.estimate.fitting import Fit, best_fit, fits, pass_problem
from pocl_dist.cluster.estimate.flops import step_work
from pocl_dist.cluster.estimate.inputs import make_setup
from pocl_dist.cluster.estimate.layout import StepLayout
from pocl_dist.cluster.estimate.memory import Phase, pass_phases, training_phases
from pocl_dist.cluster.estimate.passes import PassTime, measure_pass
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.stages import Disk, StageCost, cache_passes, disk, stage_costs
from pocl_dist.cluster.estimate.step_time import StepTime, step_time
from pocl_dist.cluster.estimate.what_if import WORLDS, WhatIf, what_if
from pocl_dist.errors import ConfigError

NOT_COUNTED = "no time is counted for: loading, checkpoints, dev answers, evaluate, report"
NOT_MEASURED = (
    "no GPU was measured: figures are those of data sheets and the shares of them that are usually "
    "reached; --flops, --intra-bandwidth and --inter-bandwidth know better"
)
ON_POLICY = "no time is counted for the student's answers of policy.mode {mode!r}"


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
    def notes(self) -> list[str]:
        """Returns what the figures rest on."""
        setup = self.setup
        notes = [*setup.workload.assumptions, f"device: {setup.device.source}"]
        if not setup.device.is_cpu:
            notes.append(NOT_MEASURED)
        if setup.config.policy.mode != "off":
            notes.append(ON_POLICY.format(mode=setup.config.policy.mode))
        return [*notes, NOT_COUNTED]

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
            "notes": self.notes,
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


def estimate(words: Sequence[str], options: Options) -> None:
    """Prints the estimate; raises ConfigError (64) when the config does not fit the devices."""
    from pocl_dist.cluster.estimate.report import report

    found = make_estimate(make_setup(words, options))
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        print(report(found))
    sys.stdout.flush()
    if not found.is_fitting:
        raise ConfigError(_misfit(found))
    if problem := pass_problem(found.setup):
        raise ConfigError(f"{found.setup.device.name} is too small: {problem}")


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
            return (
                f"{line}; no ZeRO stage, offload or micro-batch does; {world} devices do: {other}"
            )
    longest = setup.config.data.max_tokens
    return (
        f"{line}; nothing fits on up to {WORLDS[-1]} devices that can share a batch of "
        f"{setup.config.engine.global_batch_size}: a larger device, a shorter data.max_tokens "
        f"({longest}), or teacher.source: cache_hidden"
    )
