"""What surrounds every step: status, time spent, and the sealed manifest."""

from __future__ import annotations

import time
from collections.abc import Callable

from pocl_dist.config import Config
from pocl_dist.errors import StoppedError
from pocl_dist.files import write_manifest
from pocl_dist.pipeline.run_directory import RunDirectory

Step = Callable[[Config, RunDirectory], object]


def run_step(name: str, step: Step, config: Config, run: RunDirectory) -> None:
    """Runs one step with its status, its time and the manifest around it."""
    run.write_status("running", None, name)
    started = time.monotonic()
    stopped: StoppedError | None = None
    try:
        step(config, run)
    except StoppedError as error:
        stopped = error
    finally:
        if name != "report":
            run.add_seconds(name, time.monotonic() - started)
    write_manifest(run.root)  # after a stop too: what is saved can be verified before it is resumed
    if stopped is not None:
        raise stopped
