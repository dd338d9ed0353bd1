"""What a run lacks, has half of, or mixes: each with the command or the config key that mends it.

The report goes on with the rest; page and JSON say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.errors import PoclError
from pocl_dist.files import JSONValue, sha256_file
from pocl_dist.models.sources import MARKER
from pocl_dist.pipeline import verify_chain, verify_result
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.verify_records import Chain
from pocl_dist.records import Stage

_RECORDS = (
    "difficulty/inputs.json",
    "checkpoints/inputs.json",
    f"export/{MARKER}",
    "eval/*/*.json",
)
_LINKS = (
    verify_chain.difficulty,
    verify_result.checkpoints,
    verify_result.export,
    verify_result.eval,
)


@dataclass(frozen=True)
class Finding:
    """One thing that the report cannot show, or shows of something else than the rest."""

    kind: str  # "missing": not there; "unfinished": half of it; "mixed": made from something else
    part: str  # section of the page
    text: str
    remedy: str

    def to_json(self) -> dict[str, JSONValue]:
        """Returns the fields, for `report.json`."""
        return cast("dict[str, JSONValue]", asdict(self))


def missing_parts(
    config: Config, run: RunDirectory, numbers: dict[str, JSONValue]
) -> Iterator[Finding]:
    """Yields what is not there; `numbers` are those of the report."""
    if not numbers["stages"]:
        yield Finding("missing", "training", "no step of training yet", "run `pocl-dist distill`")
    elif config.data.dev is None:
        text = "no dev metric: the config names no dev rows"
        yield Finding("missing", "training", text, "data.dev names them")
    if not (run.difficulty / "ranking.parquet").exists():
        yield from _no_ranking(config)
    if not numbers["quarters"]:
        yield _no_quarters(config)
    evals = cast("dict[str, dict[str, JSONValue]]", numbers["eval"])
    if not config.data.eval:
        text = "no test answers: the config names no test set"
        yield Finding("missing", "tests", text, "data.eval names them")
    elif not evals:
        yield Finding("missing", "tests", "no test answers yet", "run `pocl-dist evaluate`")
    elif len(evals) < len(config.data.eval):
        text = f"{len(evals)} of {len(config.data.eval)} test sets are answered"
        yield Finding("unfinished", "tests", text, "run `pocl-dist evaluate`")
    if evals and not any(report.get("baselines") for report in evals.values()):
        text = "only the trained student answered the test sets"
        remedy = "evaluate.baselines: true adds the teacher and the student before training"
        yield Finding("missing", "tests", text, remedy)
    if config.report.answers == 0:
        text = "no answers are shown"
        yield Finding("missing", "answers", text, "report.answers above 0 shows some")


def _no_ranking(config: Config) -> Iterator[Finding]:
    if needs_difficulty(config):
        remedy = "run `pocl-dist measure` and `pocl-dist plan`"
        yield Finding("missing", "difficulty", "the rows are not ranked yet", remedy)
    else:
        why = "one stage" if config.curriculum.num_stages == 1 else "shuffled stages"
        text = f"no difficulty scores: a run with {why} does not need them"
        remedy = "curriculum.num_stages above 1 and curriculum.ordering other than shuffled"
        yield Finding("missing", "difficulty", text, remedy)


def _no_quarters(config: Config) -> Finding:
    text = "no scores by difficulty quarter"
    if config.dev.quarter_rows == 0:
        remedy = "dev.quarter_rows above 0: scored while training runs"
    elif needs_difficulty(config):
        remedy = "they are scored while training runs (this part of it had not begun, or was older)"
    else:
        text += ": the rows of this run are not ranked"
        remedy = "curriculum.num_stages above 1 and curriculum.ordering other than shuffled"
    return Finding("missing", "quarters", text, remedy)


def progress_finding(
    run: RunDirectory, stages: list[Stage], last_step: int, last_stage: int
) -> Iterator[Finding]:
    """Yields how far training came, when it is not at its end."""
    if not last_step or (run.export / "config.json").exists():
        return
    num_steps = sum(stage.num_steps for stage in stages)
    text = (
        f"training stands in stage {last_stage + 1} of {len(stages)}, "
        f"at step {last_step} of {num_steps}"
        if last_step < num_steps
        else "training is done, its result is not exported"
    )
    yield Finding("unfinished", "training", text, "the same command goes on from there")


def mixed_parts(config: Config, run: RunDirectory) -> Iterator[Finding]:
    """Yields results that were made from something else than the rest, as `verify` would.

    Records alone are compared, not the hash of every file.
    """
    files = [path for pattern in _RECORDS for path in run.root.glob(pattern)]
    names = {path.relative_to(run.root).as_posix(): "" for path in files}
    if run.plan.exists():
        names["plan.json"] = sha256_file(run.plan)  # the export names it
    chain = Chain(run, config, names)
    for link in _LINKS:
        try:
            lines = [line for line in link(chain) if line]
        except (PoclError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lines = [f"{link.__name__}: cannot be followed: {type(error).__name__}: {error}"]
        for line in lines:
            text = " ".join(line.split())
            yield Finding("mixed", link.__name__, text, "`pocl-dist verify` follows the chain")
