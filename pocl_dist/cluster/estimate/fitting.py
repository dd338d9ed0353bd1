"""Whether a setup fits its devices, and which ZeRO stage, offload and micro-batch would."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from pocl_dist.cluster.estimate.memory import pass_phases, training_phases
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.step_time import step_time


@dataclass(frozen=True)
class Fit:
    """A way to run the config, by the keys that only change how it is computed."""

    keys: tuple[tuple[str, str], ...]  # dotted key, value
    peak_bytes: int
    step_seconds: float

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.keys)


def peak_bytes(setup: Setup) -> int:
    """Returns what the largest phase of distill needs on the device."""
    return max(phase.total for phase in training_phases(setup))


def fits(setup: Setup) -> bool:
    """Returns whether all phases of distill fit the device."""
    return peak_bytes(setup) <= setup.device.usable_bytes


def pass_problem(setup: Setup) -> str | None:
    """Returns which pass of actors does not fit a device, and what would help; None: all fit.

    Measure halves a batch that is too large by itself; one row must fit.
    """
    usable, generation = setup.device.usable_bytes, setup.config.generation
    one_row = generation.model_copy(update={"batch_size": 1})
    config = setup.config.model_copy(update={"generation": one_row})
    for phase in pass_phases(replace(setup, config=config)):
        if phase.total <= usable:
            continue
        line = f"{phase.name} needs {phase.total / 2**30:.1f} GiB of a device"
        if phase.name != "cache pass":
            return f"{line}; a larger device, or a smaller student"
        for count in (2, 4, 8):
            other = setup.with_teacher(cache_engine="ray", devices_per_actor=count)
            if all(p.total <= usable for p in pass_phases(other) if p.name == phase.name):
                return (
                    f"{line}; this fits: teacher.devices_per_actor={count}, or "
                    "teacher.cache_engine=zero3"
                )
        return f"{line}; this may fit: teacher.cache_engine=zero3 on more devices"
    return None


def best_fit(setup: Setup) -> Fit | None:
    """Returns the quickest way that fits, of all ZeRO stages, offloads and micro-batches; or None.

    `engine.gradient_checkpointing` counts among the ways; the teacher is offloaded last.
    """
    found: list[tuple[float, int, Fit]] = []
    for number, candidate in enumerate(_candidates(setup)):
        if fits(candidate):
            seconds = step_time(candidate).total
            # Of ways that are equally quick the earlier, simpler one.
            found.append((round(seconds, 9), number, _fit(candidate, seconds)))
    return min(found)[2] if found else None


def _fit(setup: Setup, seconds: float) -> Fit:
    engine, teacher = setup.config.engine, setup.config.teacher
    keys = {
        "engine.zero_stage": str(engine.zero_stage),
        "engine.micro_batch_size": str(engine.micro_batch_size),
        "engine.gradient_checkpointing": str(engine.gradient_checkpointing).lower(),
        "engine.offload_optimizer": engine.offload_optimizer,
        "engine.offload_param": engine.offload_param,
    }
    if setup.has_online_teacher:
        keys["teacher.offload_param"] = teacher.offload_param
    return Fit(tuple(keys.items()), peak_bytes(setup), seconds)


def _candidates(setup: Setup) -> list[Setup]:
    """Returns every way, simplest first; a way is left out when a smaller change already fits."""
    stages = (0, 1, 2, 3) if setup.dtype == "fp32" else (1, 2, 3)
    most = -(-setup.config.engine.global_batch_size // setup.world_size)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= most]
    offloads = [("none", "none"), ("cpu", "none"), ("cpu", "cpu")]
    teachers = ["none", "cpu"] if setup.has_online_teacher else ["none"]
    if setup.device.is_cpu:
        offloads, teachers = offloads[:1], teachers[:1]
    ways = []
    for teacher, offload, is_checkpointed in itertools.product(teachers, offloads, (False, True)):
        optimizer, param = offload
        for stage, size in itertools.product(stages, sizes):
            if (param != "none" and stage != 3) or (optimizer != "none" and stage == 0):
                continue
            way = setup.with_engine(
                zero_stage=stage,
                micro_batch_size=size,
                gradient_checkpointing=is_checkpointed,
                offload_optimizer=optimizer,
                offload_param=param,
            )
            ways.append(way.with_teacher(offload_param=teacher))
    return ways
