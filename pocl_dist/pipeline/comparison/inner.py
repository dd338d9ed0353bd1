"""Steps of a run inside this process, under that run's own lock, status and manifest.

Ray takes 10 s to start: the passes of several runs share one session that way. Training does not
happen here: ranks are processes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocl_dist.config import Config
from pocl_dist.errors import PoclError, StoppedError
from pocl_dist.pipeline.held_run import held_run
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_step import Step, run_step


def do_steps(config: Config, steps: Sequence[tuple[str, Step]]) -> None:
    """Does (name, function) one after the other; what is finished is not done again.

    How it ended stands in the run's status, as if each had been a command of its own.
    """
    run = RunDirectory(Path(config.run_dir))
    with held_run(config, run):
        phase = steps[0][0]
        try:
            run.write_config(config)
            for name, step in steps:
                phase = name
                run_step(name, step, config, run)
            run.write_status("done", 0, phase)
        except PoclError as error:
            state = "stopped" if isinstance(error, StoppedError) else "failed"
            run.write_status(state, error.exit_code, phase, str(error))
            raise
