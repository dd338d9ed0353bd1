"""The same config on 1 to 512 devices: does it fit, how quick is a step, what does the run cost."""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.cluster.estimate.fitting import fits, peak_bytes
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.step_time import step_time

WORLDS = tuple(2**power for power in range(10))


@dataclass(frozen=True)
class WhatIf:
    """One row; `reason` says why a number of devices is not possible."""

    world_size: int
    num_nodes: int
    peak_bytes: int | None
    is_fitting: bool
    step_seconds: float | None
    communication_share: float | None
    hours: float | None  # of distill, wall-clock
    device_hours: float | None
    efficiency: float | None  # device-hours of the smallest that fits, over its own
    reason: str = ""


def what_if(setup: Setup) -> tuple[WhatIf, ...]:
    """Returns the table, at the config's own global batch."""
    rows: list[WhatIf] = []
    best: float | None = None
    for world in WORLDS:
        row = _row(setup, world, best)
        if row.is_fitting and best is None:
            best = row.device_hours
            row = _row(setup, world, best)
        rows.append(row)
    return tuple(rows)


def _row(setup: Setup, world: int, best: float | None) -> WhatIf:
    batch = setup.config.engine.global_batch_size
    per_node = min(world, setup.node_size)
    reason = ""
    if batch % world:
        reason = f"a batch of {batch} rows cannot be shared by {world}"
    elif world % per_node:
        reason = f"not whole nodes of {per_node}"
    if reason:
        return WhatIf(world, -(-world // per_node), None, False, *(None,) * 5, reason)
    other = setup.with_world(world)
    time, peak = step_time(other), peak_bytes(other)
    steps = sum(stage.num_steps for stage in other.stages)
    hours = steps * time.total / 3600
    is_fitting = fits(other)
    return WhatIf(
        world_size=world,
        num_nodes=other.cluster.num_nodes,
        peak_bytes=peak,
        is_fitting=is_fitting,
        step_seconds=time.total,
        communication_share=time.communication / time.total,
        hours=hours,
        device_hours=hours * world,
        efficiency=best / (hours * world) if best is not None and is_fitting else None,
        reason="" if is_fitting else "does not fit",
    )
