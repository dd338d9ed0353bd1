"""Starts the ranks of a step, through a file of launch/, and reads how they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from types import FrameType

from pocl_dist import errors
from pocl_dist.config import Config
from pocl_dist.config.shipped import launch_file
from pocl_dist.display import output
from pocl_dist.display.output import say
from pocl_dist.files import read_json
from pocl_dist.models.sources import MARKER
from pocl_dist.pipeline.inputs import finished_record
from pocl_dist.pipeline.rank_launcher import (
    check_can_start,
    launch_environment,
    name_lost_hosts,
)
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.status_file import read_status
from pocl_dist.pipeline.stop_request import STOP_SIGNALS, waiting_request

IDLE_STARTS = 3
"""So many starts without a new checkpoint are no bad luck any more."""
RELAY_SECONDS = 5.0
"""Some process of another session may hold the ranks' output open."""


def is_distilled(config: Config, run: RunDirectory) -> bool:
    """Returns whether the export of this config is there."""
    marker = run.export / MARKER
    return marker.exists() and read_json(marker) == finished_record(config, run)


def run_ranks(config: Config, run: RunDirectory) -> None:
    """Runs distill on ranks, as `launch_ranks` says. A finished run is left as it is.

    When a rank was lost, all are started again from the last checkpoint, `run.max_restarts` times,
    unless `IDLE_STARTS` in a row have saved nothing new.
    """
    if is_distilled(config, run):
        say(f"distill: {run.export} is there")
        return
    reached, num_idle = _last_saved(run), 0
    for restart in range(config.run.max_restarts + 1):
        try:
            return launch_ranks(config, run, "distill")
        except errors.WorkerError as error:
            saved = _last_saved(run)
            num_idle = 0 if saved > reached else num_idle + 1
            if restart == config.run.max_restarts:
                raise
            if num_idle == IDLE_STARTS:
                raise errors.WorkerError(
                    f"{error}; {num_idle} starts in a row have saved nothing new"
                ) from error
            reached = saved
            say(
                f"distill: {error}\ndistill: restart {restart + 1} of {config.run.max_restarts}, "
                f"from step {max(saved, 0)}"
            )
            run.write_status("running", None, "distill")


def _last_saved(run: RunDirectory) -> int:
    """Returns the step of the newest checkpoint, -1 without one."""
    return max(run.checkpoint_steps(), default=-1)


def launch_ranks(config: Config, run: RunDirectory, step: str) -> None:
    """Runs a step on its ranks and waits; raises the error the ranks ended with.

    SIGTERM, SIGUSR1 and Ctrl-C are turned into the stop file, so that the ranks save and
    leave together; the launcher itself never sees them (it would kill the ranks).
    """
    check_can_start(config)
    file = launch_file(f"{config.launch.ranks_with}.sh")
    command = ["bash", str(file), str((run.root / "config.yaml").resolve())]
    environment = launch_environment(config, step)
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=output.for_child()
    )
    relayed = output.relay_of(process.stdout)
    earlier = waiting_request()
    received: list[int] = []

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        if received:
            os.killpg(process.pid, signal.SIGKILL)  # the second signal means now
        received.append(number)
        run.stop_file.parent.mkdir(parents=True, exist_ok=True)
        run.stop_file.touch()

    before = {number: signal.signal(number, ask_to_stop) for number in STOP_SIGNALS}
    if earlier is not None and earlier.signal is not None:  # since its last look
        ask_to_stop(earlier.signal, None)
    code = -1
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever the launcher may have left behind
        relayed.join(RELAY_SECONDS)
        if code != 0:
            output.leave_terminal()  # a killed rank leaves its display half drawn
        if received:
            run.stop_file.unlink(missing_ok=True)
            if earlier is not None:  # the ranks may have been done before they saw the file
                earlier.take_over(received[0])
    try:
        _raise_outcome(code, run, step)
    except errors.WorkerError as error:
        raise name_lost_hosts(config, error) from None


def _raise_outcome(code: int, run: RunDirectory, step: str) -> None:
    """Raises what the ranks ended with; the launcher's own code is only a hint."""
    status = read_status(run.status)
    state, outcome, reason = status["state"], status["exit_code"], str(status["reason"])
    if state == "done" and status["phase"] == step and code == 0:
        return
    if state in ("failed", "stopped") and status["phase"] == step:
        if isinstance(outcome, int) and (error := errors.error_of(outcome, reason)):
            raise error
        raise RuntimeError(f"{step} failed: {reason}")
    if error := errors.error_of(code, f"the ranks of {step} ended with exit code {code}"):
        raise error  # on a full disk the last word could not be written
    raise errors.WorkerError(
        f"the ranks of {step} ended without a word (launcher's exit code {code})"
    )
