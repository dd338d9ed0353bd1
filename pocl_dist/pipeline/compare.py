"""compare: does the curriculum help on these data? All arms at equal sample visits, one table.

    RUN/shared/, RUN/runs/ARM/lr-X/seed-N/    ordinary run directories (comparison/folders.py)
    RUN/comparison.json, .md, .html           the table; written again whenever a seed is complete

docs/compare.md says how to read it, docs/decisions/compare.md why it is made this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pocl_dist.config import Config, replaced
from pocl_dist.curriculum.stages import stage_sizes
from pocl_dist.display.output import say
from pocl_dist.errors import ConfigError, PoclError, StoppedError, error_of
from pocl_dist.files import JSONValue, atomic_write_json, atomic_write_text
from pocl_dist.pipeline.comparison import rates
from pocl_dist.pipeline.comparison.ablations import AblationRow, Case, add_ablations
from pocl_dist.pipeline.comparison.arms import Arm, RowCounts, baselines, check_base, pair_of
from pocl_dist.pipeline.comparison.folders import run_of
from pocl_dist.pipeline.comparison.nested import RESULT
from pocl_dist.pipeline.comparison.request import CompareRequest
from pocl_dist.pipeline.comparison.rounds import Comparison, work
from pocl_dist.pipeline.comparison.scores import AVERAGE
from pocl_dist.pipeline.comparison.shared import count_rows, make_shared, shared_config
from pocl_dist.pipeline.comparison.state import Inputs
from pocl_dist.pipeline.comparison.tables import html, markdown, print_tables
from pocl_dist.pipeline.comparison.tabulate import tabulate
from pocl_dist.pipeline.comparison.visits import check_equal, stages_of, visits_of
from pocl_dist.pipeline.inputs import (
    finished_record,
    read_eval_sets,
    read_prompts,
    read_train,
)
from pocl_dist.pipeline.preflight import check_inputs
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest


def compare(config: Config, run: RunDirectory, request: CompareRequest) -> None:
    """Trains, evaluates and tabulates all arms; what is finished is not done again.

    1. refuse what can be known to be wrong; 2. make what the arms share; 3. seed by seed, train and
    evaluate what is missing, and write the table; 4. raise the error of a run that is missing in
    it, so that schedulers learn of it too. A stop (75) writes the table as far as it goes.
    """
    with StopRequest(run, config.run.max_wallclock_minutes).installed() as stop:
        grid = check_before(config, request)
        check_inputs(config, run)
        make_shared(config, run, stop)
        comparison = prepare(config, request, grid)
        _say_plan(comparison)
        try:
            work(
                comparison,
                request.jobs,
                request.is_training,
                stop,
                lambda: _write(comparison, request),
            )
        except StoppedError:
            print_tables(_write(comparison, request))
            raise
        value = _write(comparison, request)
        print_tables(value)
        say(f"compare: {run.root / RESULT} and {run.root / 'comparison.md'}")
        if request.is_training:  # else the table of what is there is all that was asked for
            raise_missing(comparison, value)


def check_before(config: Config, request: CompareRequest) -> tuple[float, ...]:
    """Returns the grid of learning rates; raises before anything is started or written.

    ConfigError (64): nothing to compare, an arm's keys contradict each other, unequal visits, a
    choice without dev. DataError (65): fewer rows than an ablation has stages.
    """
    check_base(config)
    if AVERAGE in (names := list(read_eval_sets(config))) and len(names) > 1:
        raise ConfigError(
            f"data.eval: a test set named {AVERAGE!r} would be taken for the average column of the "
            "table; rename the file"
        )
    grid = rates.grid_of(config, request.lr_grid)
    num_rows = len(read_prompts(config).examples)
    arms, _, target = arms_of(config, request, RowCounts(num_rows, num_rows, num_rows))
    for arm in arms:
        for rate in grid:
            run_of(config, arm, rate, request.seeds[0])
    _check_visits(config, arms, RowCounts(num_rows, num_rows, num_rows), target)
    return grid


def arms_of(
    config: Config, request: CompareRequest, counts: RowCounts
) -> tuple[list[Arm], list[AblationRow], int]:
    """Returns the arms, the lines of the ablation table, and the visits that all arms make."""
    stage_sizes(counts.ranked, config.curriculum.num_stages)
    target = visits_of(stages_of(config, counts.ranked))
    pairs = [pair_of(method, config, target, counts) for method in request.methods]
    arms = [*baselines(target, counts), *(arm for pair in pairs for arm in pair)]
    cases = [Case(config, plain, pocl, target, counts) for plain, pocl in pairs]
    with_ablations, rows = add_ablations(request.ablate, cases, arms)
    return with_ablations, rows, target


def _check_visits(config: Config, arms: list[Arm], counts: RowCounts, target: int) -> None:
    visits = {}
    for arm in arms:
        of_arm = arm.config(config)
        visits[arm.name] = visits_of(stages_of(of_arm, counts.of(of_arm)))
    check_equal(visits, target)


def prepare(config: Config, request: CompareRequest, grid: tuple[float, ...]) -> Comparison:
    """Returns all that is decided before the first training, given what the arms share."""
    counts = count_rows(config)
    arms, rows, target = arms_of(config, request, counts)
    _check_visits(config, arms, counts, target)
    return Comparison(
        config, tuple(arms), tuple(rows), grid, request.seeds, counts, target, _inputs(config)
    )


def _inputs(config: Config) -> Inputs:
    shared = shared_config(config)
    directory = RunDirectory(Path(shared.run_dir))
    record = finished_record(shared, directory)
    generated = read_train(replaced(shared, {"data.responses": "teacher"}))
    return Inputs(
        train={"references": read_prompts(config).digest, "teacher": generated.digest},
        tests={name: rows.digest for name, rows in read_eval_sets(config).items()},
        models={key: value for key, value in record.items() if key.startswith("digest.")},
    )


def _say_plan(comparison: Comparison) -> None:
    num_arms, num_rates = len(comparison.arms), len(comparison.grid)
    num_runs = num_arms * (num_rates + len(comparison.seeds) - 1)
    say(
        f"compare: {num_arms} arms x ({num_rates} learning rate(s) with the first seed + "
        f"{len(comparison.seeds) - 1} more seed(s)) = {num_runs} trainings of "
        f"{comparison.target_visits} sample visits each"
    )


def _write(comparison: Comparison, request: CompareRequest) -> Mapping[str, JSONValue]:
    value = tabulate(comparison, request.to_json())
    root = comparison.run.root
    atomic_write_json(root / RESULT, value)
    atomic_write_text(root / "comparison.md", markdown(value))
    atomic_write_text(root / "comparison.html", html(root.name, value))
    return value


def raise_missing(comparison: Comparison, value: Mapping[str, JSONValue]) -> None:
    """Raises what keeps a run out of the table: a cause that may pass first, then any other."""
    if value["is_complete"]:
        return
    looks = [comparison.look(c) for c in comparison.chosen_runs(comparison.seeds)]
    looks += [c.look for arm in comparison.arms for c in comparison.candidates(arm)]
    codes = [look.exit_code for look in looks if look.exit_code is not None]
    codes += [78 for look in looks if look.state == "mixed"]
    codes.sort(key=lambda code: code not in (69, 71))
    marks = value["marks"]
    assert isinstance(marks, list)
    text = f"the table lacks runs: {'; '.join(map(str, marks))}"
    error: PoclError | None = error_of(codes[0], text) if codes else None
    raise error or StoppedError(text)
