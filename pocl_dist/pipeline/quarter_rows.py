"""Which training rows stand for each quarter of the difficulty ranking, the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.distributed.checkpoint import agree_on_digest
from pocl_dist.distributed.process_group import Rank
from pocl_dist.files import JSONValue, digest_of
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import EncodedExample, Example, Plan

NUM_QUARTERS = 4


def quarter_rows(
    config: Config,
    run: RunDirectory,
    plan: Plan,
    examples: Sequence[Example],
    encoded: Mapping[str, EncodedExample],
    rank: Rank,
) -> list[list[tuple[Example, EncodedExample]]]:
    """Returns the rows that stand for each quarter, easy to hard. Collective.

    Raises MismatchError (78) when a rank would take others than rank 0.
    """
    ids = choose_quarters(config, run, plan, encoded)
    agree_on_digest(digest_of(cast("JSONValue", ids)), rank, "choice of rows for the quarters")
    wanted = {name for quarter in ids for name in quarter}
    by_id = {row.example_id: row for row in examples if row.example_id in wanted}
    return [[(by_id[name], encoded[name]) for name in quarter] for quarter in ids]


def choose_quarters(
    config: Config, run: RunDirectory, plan: Plan, known: Collection[str]
) -> list[list[str]]:
    """Returns ids of training rows per quarter, easy to hard; [] when nothing ranks the rows.

    At most `dev.quarter_rows` of each, drawn by seed. With fewer rows than quarters the last one
    has them all, as the last stage would.
    """
    if not config.dev.quarter_rows:
        return []
    ranking = _easy_to_hard(config, run, plan, known)
    part = len(ranking) // NUM_QUARTERS
    starts = [part * index for index in range(NUM_QUARTERS)]
    chosen = []
    for index, (start, stop) in enumerate(zip(starts, [*starts[1:], len(ranking)], strict=True)):
        count = min(config.dev.quarter_rows, stop - start)
        drawn = random.Random(f"{config.seed} quarter {index}").sample(range(start, stop), count)
        chosen.append([ranking[position] for position in sorted(drawn)])
    return chosen if len(ranking) else []


def _easy_to_hard(
    config: Config, run: RunDirectory, plan: Plan, known: Collection[str]
) -> Sequence[str]:
    """Returns the ids of the ranking, easy to hard; none where the plan does not know it.

    A run without stages, or with shuffled ones, has none of its own; scores that were put into its
    `difficulty/` (as `compare` does, so that its arms are cut alike) rank it all the same.
    """
    if needs_difficulty(config):
        is_reversed = config.curriculum.ordering == "reversed"
        return plan.ranking[::-1] if is_reversed else plan.ranking
    file = run.difficulty / "ranking.parquet"
    if not file.exists():
        return ()
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(file, columns=["example_id"]).column("example_id").to_pylist()
    return ids if all(name in known for name in ids) else ()
