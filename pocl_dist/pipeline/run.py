"""run: all steps that the config needs, one after the other; what is finished is not done again."""

from __future__ import annotations

from pocl_dist.config import Config
from pocl_dist.config import steps as config_steps
from pocl_dist.display.output import emit, mode, say
from pocl_dist.errors import StoppedError
from pocl_dist.pipeline.cache import cache
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.generate import generate
from pocl_dist.pipeline.init_student import init_student
from pocl_dist.pipeline.launch_local import run_ranks
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.preflight import check_inputs
from pocl_dist.pipeline.report import report
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_step import Step, run_step
from pocl_dist.pipeline.stop_request import StopRequest


def steps_of(config: Config) -> list[tuple[str, Step]]:
    """Returns (name, function) of the steps that the config needs, in order."""
    functions: dict[str, Step] = {
        "init-student": init_student,
        "generate": generate,
        "measure": measure,
        "plan": make_plan,
        "cache": cache,
        "distill": run_ranks,
        "evaluate": evaluate,
        "report": report,
    }
    return [(name, functions[name]) for name in config_steps.steps_of(config)]


def run_all(config: Config, run: RunDirectory) -> None:
    """Checks the inputs, then runs each step; the manifest is sealed again after every one.

    A signal that a step does not act on itself ends the run (75) before the next step.
    """
    steps = steps_of(config)
    with StopRequest(run, config.run.max_wallclock_minutes).installed() as stop:
        check_inputs(config, run)
        for number, (name, step) in enumerate(steps, start=1):
            if stop.is_asked():
                raise StoppedError(f"stopped before {name}; the same command goes on from there")
            emit("phase", phase=name, number=number, of=len(steps))
            if mode() != "json":
                say(f"== {number}/{len(steps)} {name}")
            run_step(name, step, config, run)
