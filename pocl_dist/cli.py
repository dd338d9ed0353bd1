"""Subcommands. A step, and with it torch, ray or deepspeed, is imported only when it is called."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.arguments import parse
from pocl_dist.cluster.estimate.arguments import options_of
from pocl_dist.display import output
from pocl_dist.errors import (
    EXIT_CODES,
    MismatchError,
    MissingInputError,
    PoclError,
    StoppedError,
    UsageError,
    WorkerError,
)
from pocl_dist.files import JSONValue, explain_storage_error, guarded, make_private
from pocl_dist.guards import check_versions, printable

if TYPE_CHECKING:
    from pocl_dist.config import Config
    from pocl_dist.pipeline.run_directory import RunDirectory

# Where the function of each command lies; imported when it is called.
STEP_FUNCTIONS = {
    "run": ("run", "run_all"),
    "init-student": ("init_student", "init_student"),
    "generate": ("generate", "generate"),
    "measure": ("measure", "measure"),
    "plan": ("plan", "make_plan"),
    "cache": ("cache", "cache"),
    "cache-rank": ("cache_rank", "cache_rank"),
    "distill": ("launch_local", "run_ranks"),
    "distill-rank": ("distill", "distill_rank"),
    "evaluate": ("evaluate", "evaluate"),
    "report": ("report", "report"),
    "compare": ("compare", "compare"),
}


def _step_of(command: str, is_rank: bool) -> Callable[[Config, RunDirectory], object]:
    """Returns the function of a config command; `is_rank`: a launcher started this process."""
    name = f"{command}-rank" if is_rank and f"{command}-rank" in STEP_FUNCTIONS else command
    module, function = STEP_FUNCTIONS[name]
    step: Callable[[Config, RunDirectory], object] = getattr(
        import_module(f"pocl_dist.pipeline.{module}"), function
    )
    return step


def _run_config_command(command: str, words: Sequence[str], **options: object) -> None:
    from pocl_dist.config import load_words
    from pocl_dist.config.steps import is_ranks_work
    from pocl_dist.distributed.scratch import use_scratch
    from pocl_dist.pipeline.held_run import held_run
    from pocl_dist.pipeline.run_directory import RunDirectory
    from pocl_dist.pipeline.run_lock import check_not_fenced
    from pocl_dist.pipeline.run_step import run_step
    from pocl_dist.pipeline.stop_request import StopRequest, mark_start

    config = load_words(words)
    output.use(config.log.output)
    run = RunDirectory(Path(config.run_dir))
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if is_rank and not is_ranks_work(command, config):
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise UsageError(
                f"{command} is one process; a launcher starts `distill`, "
                "and `cache` with teacher.cache_engine: zero3"
            )
        is_rank = False
    check_versions()
    use_scratch(config.run.scratch_dir, run.root)
    mark_start()
    step = partial(_step_of(command, is_rank), **options)
    # Ranks that `run` or `distill` started work under the lock, config and manifest of that
    # process; those of another launcher (torchrun, Slurm) have rank 0 for it.
    is_child = is_rank and os.environ.get("POCL_DIST_PARENT") == str(run.root.resolve())
    is_owner = not is_child and (not is_rank or os.environ["RANK"] == "0")
    with contextlib.ExitStack() as stack:
        if not is_rank and command != "run":  # which asks, and looks, itself
            stop = StopRequest(run, config.run.max_wallclock_minutes)
            stack.enter_context(stop.installed())
        if is_owner:
            stack.enter_context(held_run(config, run))
        else:
            stack.enter_context(guarded(run.root, lambda: check_not_fenced(run.root)))
        try:
            if is_owner:
                run.write_config(config)
                run.write_status("running", None, command)
                os.environ["POCL_DIST_PARENT"] = str(run.root.resolve())
            if is_owner and command != "run":
                run_step(command, step, config, run)
            else:
                step(config, run)
            if is_owner or os.environ["RANK"] == "0":
                run.write_status("done", 0, command)
        except BaseException as error:
            if is_owner and isinstance(error, StoppedError):
                run.stop_file.unlink(missing_ok=True)  # honoured: the same command goes on
            has_joined = is_owner or is_child or _has_joined()
            if has_joined:  # else the run may be another's: rank 0 was refused, this one left alone
                _record_failure(run, command, error, is_rank)
            raise


def _has_joined() -> bool:
    """Returns whether this rank is in a process group; without importing torch for the question."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _record_failure(run: RunDirectory, command: str, error: BaseException, is_rank: bool) -> None:
    """Writes how the run ended; of ranks the first report stands, the others lost a peer."""
    from pocl_dist.pipeline.status_file import read_status

    code, reason = describe(error)
    status: dict[str, JSONValue] = {}
    with contextlib.suppress(MissingInputError, MismatchError):  # none yet, or damaged: a new one
        status = read_status(run.status)
    if is_rank and status.get("state", "running") != "running":
        return
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    try:
        run.write_status(state, code, str(status.get("phase", command)), reason)
    except (OSError, WorkerError) as problem:  # the disk is full, or the run is another's by now
        print(f"warning: {run.status} was not written: {problem}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and one line (or a few) for an exception."""
    if isinstance(error, PoclError):
        return error.exit_code, printable(str(error))
    if isinstance(error, OSError) and (line := explain_storage_error(error)):
        return 74, printable(line)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 70, printable(f"{type(error).__name__}: {error}")


def _shape_words(arguments: argparse.Namespace) -> list[str]:
    """Returns the overrides that `--nodes` and `--gpus-per-node` stand for."""
    given = {key: getattr(arguments, key) for key in ("nodes", "gpus_per_node")}
    return [f"launch.{key}={value}" for key, value in given.items() if value is not None]


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "exit-codes":
        for row in EXIT_CODES:
            print(
                f"{row.code:3d}  {row.name:12s} {'retry' if row.is_retryable else '     '}  "
                f"{row.meaning}"
            )
    elif arguments.command == "verify":
        from pocl_dist.pipeline.verify import verify

        verify(arguments.run_dir)
    elif arguments.command == "outcome":
        from pocl_dist.pipeline.status_file import outcome

        return outcome(arguments.run_dir)
    elif arguments.command == "estimate":
        from pocl_dist.cluster.estimate.estimate import estimate

        estimate(arguments.config, options_of(arguments))
    elif arguments.command == "launch":
        from pocl_dist.cluster.launch import launch

        words = [*arguments.config, *_shape_words(arguments)]
        launch(arguments.target, words, arguments.render, arguments.dry_run)
    elif arguments.command == "doctor":
        from pocl_dist.cluster.doctor.case import Options
        from pocl_dist.cluster.doctor.command import doctor
        from pocl_dist.pipeline.probes import PROBES

        shape = _shape_words(arguments)
        options = Options(bool(shape), arguments.gpu, arguments.wait)
        return doctor([*arguments.config, *shape], options, PROBES, arguments.json)
    elif arguments.command == "compare":
        from pocl_dist.pipeline.comparison.request import parse_request

        lists = (arguments.methods, arguments.seeds, arguments.lr_grid, arguments.ablate)
        request = parse_request(*lists, arguments.jobs, not arguments.no_training)
        _run_config_command("compare", arguments.config, request=request)
    elif arguments.command == "score":
        from pocl_dist.pipeline.score import score_files

        summary = score_files(arguments.predictions, arguments.references)
        print(json.dumps(summary.to_json()))
    else:
        words = list(arguments.config)
        if getattr(arguments, "max_restarts", None) is not None:
            words.append(f"run.max_restarts={arguments.max_restarts}")
        if arguments.output is not None:
            words.append(f"log.output={arguments.output}")
            output.use(arguments.output)
        if getattr(arguments, "harness", None):
            tasks = [task for text in arguments.harness for task in text.split(",")]
            words.append(f"evaluate.harness={json.dumps(tasks)}")
        _run_config_command(arguments.command, words)
    return 0


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, runs the command and exits with the code of the table."""
    if "RANK" in os.environ and "POCL_DIST_VISIBLE_DEVICES" in os.environ:
        # Before torch is imported: the deepspeed launcher has replaced the caller's choice.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["POCL_DIST_VISIBLE_DEVICES"]
    arguments = parse(words)
    make_private()
    is_rank_of_ours = "RANK" in os.environ and "POCL_DIST_PARENT" in os.environ
    has_last_word = os.environ.get("RANK", "0") == "0" and not is_rank_of_ours
    with output.kept():
        code, reason = 0, ""
        try:
            code = _dispatch(arguments)
        except Exception as error:
            code, reason = describe(error)
            if code == 70:
                traceback.print_exc()
                reason += "\nThis is a bug in pocl_dist; please report it with the lines above."
            # All ranks stop together, and whoever started them says so: once is enough.
            if not (code == StoppedError.exit_code and is_rank_of_ours):
                print(f"pocl-dist {arguments.command}: {reason}", file=sys.stderr, flush=True)
        if has_last_word:
            output.emit_outcome(arguments.command, code, reason)
        output.flush()
        if "RANK" in os.environ:
            # A rank that failed must not wait in the destructors of a process group for the others.
            os._exit(code)
    sys.exit(code)
