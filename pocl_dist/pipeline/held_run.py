"""A run directory taken for work: checked, locked, cleared of half files, put back if refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pocl_dist.config import Config
from pocl_dist.pipeline.manifest import remove_leftovers
from pocl_dist.pipeline.run_directory import RunDirectory, kept_if_refused
from pocl_dist.pipeline.run_format import check_run_directory
from pocl_dist.pipeline.run_lock import run_lock


@contextlib.contextmanager
def held_run(config: Config, run: RunDirectory) -> Iterator[None]:
    """Holds the run directory while the context lasts.

    Raises what `check_run_directory` finds wrong with it, and BusyError (73) when another run has
    it.
    """
    check_run_directory(run.root, config.resume.strict_versions)
    with run_lock(run.root):
        remove_leftovers(run.root)
        with kept_if_refused(run.root):
            yield
