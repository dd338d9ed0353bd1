"""The difficulty ranking as the data of scatter and curve: some thousand of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocl_dist.data.columns import open_parquet
from pocl_dist.pipeline.report_page.series import Columns
from pocl_dist.pipeline.report_page.thinning import evenly
from pocl_dist.records import Stage

MAX_POINTS = 3000
_NAMES = ("example_id", "rouge_l", "cross_entropy", "fused_score")


@dataclass(frozen=True)
class Ranking:
    """Rows of the ranking, easy to hard, evenly taken: the first and the last are among them."""

    points: Columns  # place counts from 1; stage is the one that a row is first trained in
    num_rows: int


def read_ranking(file: Path, stages: Sequence[Stage], is_reversed: bool) -> Ranking:
    """Returns every so-manieth row of `ranking.parquet`; memory does not grow with the file.

    `stages` may be empty: then the rows belong to none, and `stage` is null.
    """
    table = open_parquet(file)
    num_rows = int(table.metadata.num_rows)
    stride = evenly(num_rows, MAX_POINTS)
    points: Columns = {name: [] for name in ("place", "stage", *_NAMES)}
    offset = 0
    for batch in table.iter_batches(columns=list(_NAMES)):
        places = [
            offset + index
            for index in range(batch.num_rows)
            if (offset + index) % stride == 0 or offset + index == num_rows - 1
        ]
        indices = np.asarray([place - offset for place in places])  # of a list: imports pandas
        rows = batch.take(indices).to_pydict() if places else {}
        for name in _NAMES if places else ():
            points[name] += rows[name]
        points["place"] += [place + 1 for place in places]
        at = [num_rows - 1 - place if is_reversed else place for place in places]
        points["stage"] += [_stage_of(position, stages) for position in at]
        offset += batch.num_rows
    return Ranking(points, num_rows)


def _stage_of(position: int, stages: Sequence[Stage]) -> int | None:
    """Returns the first stage whose rows have the position in the plan."""
    return next((stage.index for stage in stages if position < stage.num_examples), None)
