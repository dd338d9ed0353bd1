"""What `doctor` asks of the steps themselves, before one is started: nothing is written.

A probe returns warnings and raises the error that a run would end with. `doctor` (cluster/) gets
them from the command line: it and the steps do not import one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from pocl_dist.config import Config, load_config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.errors import ConfigError, MismatchError, PoclError
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.resume_rules import records_of
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_format import look_at_run_directory
from pocl_dist.pipeline.run_lock import check_free
from pocl_dist.pipeline.server_answers import find_server
from pocl_dist.records import Plan


def run_directory(config: Config) -> list[str]:
    """Whether this version may go on with what lies in the run directory."""
    return look_at_run_directory(Path(config.run_dir), config.resume.strict_versions)


def lock(config: Config) -> list[str]:
    """Whether another run is at work in it."""
    check_free(Path(config.run_dir))
    return []


def resumed_results(config: Config) -> list[str]:
    """Whether the results that are there already were made from this config (docs/resume.md)."""
    run = RunDirectory(Path(config.run_dir))
    kept = run.root / "config.yaml"
    if not kept.exists():
        return []
    try:
        before = load_config([kept])
    except ConfigError as error:
        return [
            f"{kept} is no config of this version, so the results there were not compared: "
            f"{str(error).splitlines()[0]}"
        ]
    plan = Plan((), ())
    if run.plan.exists():
        try:
            plan = read_plan(run.plan)
        except PoclError as error:
            return [f"{run.plan}: {error}"]
    old, new = records_of(before, plan), records_of(config, plan)
    differing = []
    for result, record in new.items():
        names = [name.strip("` /") for name in result.split(",")]
        if not any((run.root / name).exists() for name in names):
            continue
        was, shown_name = old[result], result.replace("`", "")
        differing += [
            f"{shown_name} was made with {key} {was.get(key)!r}, now {record.get(key)!r}"
            for key in sorted(set(was) | set(record))
            if was.get(key) != record.get(key)
        ]
    if differing:
        raise MismatchError("; ".join(differing))
    return []


def answer_server(config: Config) -> list[str]:
    """Whether the server that measure asks (`measure.engine: server`) answers."""
    if config.measure.engine == "server" and needs_difficulty(config):
        find_server(config)
    return []


PROBES: Mapping[str, Callable[[Config], list[str]]] = MappingProxyType(
    {
        "run directory": run_directory,
        "lock": lock,
        "resumed results": resumed_results,
        "answer server": answer_server,
    }
)
