"""The rows of all sources: can each be used, are some of them the same, are they enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import (
    SEE_ABOVE,
    Finding,
    SkipError,
    error,
    ok,
    skipped,
    warning,
)
from pocl_dist.config import Config
from pocl_dist.data.row_streams import rows_file
from pocl_dist.data.sets import NamedSource, check_enough, named_sources
from pocl_dist.data.sources import Rows, read_rows
from pocl_dist.errors import PoclError
from pocl_dist.guards import shown
from pocl_dist.records import Example

MAX_ROWS = 20_000
"""Rows that are read of each source: a second or so. A run reads all of them."""
NUM_SHOWN = 3
PATH = "correct the path; a relative one counts from the folder in which the command is given"


def rows(case: Case) -> Iterator[Finding]:
    """Reads each source as a run would, but goes on after a bad row: all of them are told."""
    for source in named_sources(case.config):
        try:
            yield from _source(case, source)
        except PoclError as problem:  # the other sources are looked at all the same
            how = PATH if problem.exit_code == 66 else ""
            yield error(problem.exit_code, str(problem), how=how)
    train = case.rows.get("data.train")
    if train is not None and not case.is_partial["data.train"]:
        check_enough(case.config, train)
        yield from _small_stages(case.config, len(train.examples))


def _source(case: Case, source: NamedSource) -> Iterator[Finding]:
    if rows_file(source.source, source.key) is None:
        yield skipped(
            f"{source.key}: {source.source!r} is a data set of the hub, not downloaded here",
            "download it as a file and name that, to have its rows looked at",
        )
        return
    limit = MAX_ROWS if source.limit is None else min(source.limit, MAX_ROWS)
    found = read_rows(
        source.source,
        source.key,
        limit=limit,
        on_bad_row="quarantine",
        max_bad_rows=10 * MAX_ROWS,
    )
    num_rows = len(found.examples)
    is_partial = num_rows == MAX_ROWS and source.limit != MAX_ROWS
    case.rows[source.key], case.is_partial[source.key] = found, is_partial
    count = f"the first {num_rows} rows" if is_partial else f"{num_rows} rows"
    if not found.bad_rows:
        yield ok(f"{source.key}: {count}, all usable ({source.source})")
    else:
        yield _bad_rows(case.config, source, found)


def _bad_rows(config: Config, source: NamedSource, found: Rows) -> Finding:
    data, bad = config.data, found.bad_rows
    lines = "; ".join(map(str, bad[:NUM_SHOWN]))
    more = f" (and {len(bad) - NUM_SHOWN} more)" if len(bad) > NUM_SHOWN else ""
    line = f"{source.key}: {len(bad)} of {len(bad) + len(found.examples)} rows are bad: "
    line += lines + more
    if data.on_bad_row == "fail":
        return error(65, line)
    if len(bad) > data.max_bad_rows:
        return error(65, f"{line}; data.max_bad_rows is {data.max_bad_rows}")
    return warning(
        line,
        "data.on_bad_row is 'quarantine': they are left out and listed in quarantine.jsonl.",
        "mend the rows if they matter",
    )


def _small_stages(config: Config, num_rows: int) -> Iterator[Finding]:
    stages, batch = config.curriculum.num_stages, config.engine.global_batch_size
    if num_rows // stages < batch:
        yield warning(
            f"data.train: the first of {stages} stages has {num_rows // stages} rows, less than "
            f"engine.global_batch_size {batch}",
            "Its batches are smaller than the learning rate was chosen for.",
            "fewer curriculum.num_stages, a smaller batch, or more rows",
        )


def repeated_rows(case: Case) -> Iterator[Finding]:
    """Finds rows that stand twice in the training data, and test rows that are trained on."""
    if "data.train" not in case.rows:
        raise SkipError(f"the rows of data.train could not be read {SEE_ABOVE}")
    train = case.rows["data.train"].examples
    part = "the first rows of " if case.is_partial["data.train"] else ""
    same = Counter((e.prompt, e.context, e.references, e.history) for e in train)
    num_same = sum(count - 1 for count in same.values())
    if num_same:
        (prompt, *_), count = same.most_common(1)[0]
        yield warning(
            f"{part}data.train: {num_same} of {len(train)} rows repeat another "
            f"(most often, {count} times: {shown(prompt)})",
            "They count as often as they stand there, in the ranking and in training.",
            "remove the repeats if they are not meant",
        )
    trained = {_question(example) for example in train}
    found_overlap = False
    for key, other in case.rows.items():
        if key == "data.train":
            continue
        known = [example for example in other.examples if _question(example) in trained]
        if known:
            found_overlap = True
            share = len(known) / len(other.examples)
            yield warning(
                f"{key}: {len(known)} of {len(other.examples)} questions ({share:.1%}) stand in "
                f"{part}data.train too (first: {shown(known[0].prompt)})",
                "Its figures then tell what was memorised, not what was learnt.",
                "take them out of one of the two",
            )
    if not num_same and not found_overlap:
        others = [key for key in case.rows if key != "data.train"]
        shared = f", no question of {', '.join(others)} in it" if others else ""
        yield ok(f"{part}data.train: no row twice{shared}")


def _question(example: Example) -> tuple[str, ...]:
    """Returns what a model is asked, without regard to case and white space."""
    turns = [text for _, text in example.history]
    return tuple(
        " ".join(text.casefold().split()) for text in (*turns, example.prompt, example.context)
    )
