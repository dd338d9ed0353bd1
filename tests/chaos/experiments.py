"""The experiments by name, in the order in which they run: the whole command first."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos import (
    clock_skew,
    coordinator_model,
    damage,
    enospc,
    fenced_writer,
    flipped_bits,
    frozen_rank,
    full_disk,
    hostile,
    kill_driver,
    kill_passes,
    kill_run,
    kill_training,
    mutants,
    nonfinite,
    stop_phases,
    two_jobs,
    world_size,
    write_order,
)
from tests.chaos.lab import Lab
from tests.chaos.result import Result

EXPERIMENTS: dict[str, Callable[[Lab], Result]] = {
    "kill_run": kill_run.run,
    "two_jobs": two_jobs.run,
    "flipped_bits": flipped_bits.run,
    "stop_phases": stop_phases.run,
    "kill_passes": kill_passes.run,
    "kill_driver": kill_driver.run,
    "kill_training": kill_training.run,
    "damage": damage.run,
    "write_order": write_order.run,
    "full_disk": full_disk.run,
    "enospc": enospc.run,
    "frozen_rank": frozen_rank.run,
    "nonfinite": nonfinite.run,
    "world_size": world_size.run,
    "fenced_writer": fenced_writer.run,
    "clock_skew": clock_skew.run,
    "coordinator_model": coordinator_model.run,
    "hostile": hostile.run,
    "mutants": mutants.run,
}
