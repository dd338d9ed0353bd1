"""Which training rows stand for each quarter of the difficulty ranking, the same on every rank."""

from __future__ import annotations

import random
from typing import cast

import numpy as np

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.data.columns import join, places_in
from pocl_dist.data.sources import Rows
from pocl_dist.distributed.checkpoint import agree_on_digest
from pocl_dist.distributed.process_group import Rank
from pocl_dist.files import JSONValue, digest_of
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.train_rows import EncodedRows
from pocl_dist.records import EncodedExample, Example

NUM_QUARTERS = 4


def quarter_rows(
    config: Config, run: RunDirectory, examples: EncodedRows, rank: Rank
) -> list[list[tuple[Example, EncodedExample]]]:
    """Returns the rows that stand for each quarter, easy to hard. Collective.

    Raises MismatchError (78) when a rank would take others than rank 0.
    """
    chosen = choose_quarters(config, run, examples.rows, examples.places)
    agree_on_digest(digest_of(cast("JSONValue", chosen)), rank, "choice of rows for the quarters")
    return [[(examples.rows.examples[row], examples.row(row)) for row in part] for part in chosen]


def choose_quarters(
    config: Config, run: RunDirectory, rows: Rows, ranking: np.ndarray
) -> list[list[int]]:
    """Returns places among the training rows per quarter, easy to hard; [] without a ranking.

    `ranking`: the places in the order of the plan. At most `dev.quarter_rows` of each quarter,
    drawn by seed. With fewer rows than quarters the last one has them all, as the last stage would.
    """
    if not config.dev.quarter_rows:
        return []
    easy_to_hard = _easy_to_hard(config, run, rows, ranking)
    part = len(easy_to_hard) // NUM_QUARTERS
    starts = [part * index for index in range(NUM_QUARTERS)]
    ends = [*starts[1:], len(easy_to_hard)]
    chosen = []
    for index, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        count = min(config.dev.quarter_rows, stop - start)
        drawn = random.Random(f"{config.seed} quarter {index}").sample(range(start, stop), count)
        chosen.append([int(easy_to_hard[place]) for place in sorted(drawn)])
    return chosen if len(easy_to_hard) else []


def _easy_to_hard(config: Config, run: RunDirectory, rows: Rows, ranking: np.ndarray) -> np.ndarray:
    """Returns the places of the rows, easy to hard; none where the plan does not know it.

    A run without stages, or with shuffled ones, has no ranking; scores that were put into its
    `difficulty/` (as `compare` does, so that its arms are cut alike) rank it all the same.
    """
    if needs_difficulty(config):
        return ranking[::-1] if config.curriculum.ordering == "reversed" else ranking
    file = run.difficulty / "ranking.parquet"
    if not file.exists():
        return ranking[:0]
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pq.read_table(file, columns=["example_id"]).column("example_id")
    places = places_in(rows.ids(), join([part.cast(pa.large_string()) for part in column.chunks]))
    return places[:0] if (places < 0).any() else places
