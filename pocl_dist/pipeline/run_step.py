"""What surrounds every step: status, time spent, and the sealed manifest."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable

from pocl_dist.config import Config
from pocl_dist.errors import PoclError, StoppedError
from pocl_dist.pipeline.manifest import remove_leftovers, write_manifest
from pocl_dist.pipeline.run_directory import RunDirectory

Step = Callable[[Config, RunDirectory], object]


def run_step(name: str, step: Step, config: Config, run: RunDirectory) -> None:
    """Runs one step with its status, its time and the manifest around it.

    After a stop too: what is saved can be verified before it is resumed.
    """
    run.write_status("running", None, name)
    started = time.monotonic()
    stopped: StoppedError | None = None
    try:
        step(config, run)
    except StoppedError as error:
        stopped = error
    except BaseException:
        with contextlib.suppress(OSError, PoclError):  # what stopped the step matters more
            _add_seconds(name, run, started)
        raise
    _add_seconds(name, run, started)
    # What was only about the living; after an error it stays, to be looked at.
    shutil.rmtree(run.root / "control" / "ranks", ignore_errors=True)
    remove_leftovers(run.root)
    write_manifest(run.root)
    if stopped is not None:
        raise stopped


def _add_seconds(name: str, run: RunDirectory, started: float) -> None:
    if name != "report":  # it reports them
        run.add_seconds(name, time.monotonic() - started)
