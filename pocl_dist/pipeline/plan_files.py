"""`plan.json`, and the Parquet file beside it that holds a long ranking. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from pocl_dist.data.columns import (
    TextColumn,
    Texts,
    join,
    number_array,
    numbers_of,
    open_parquet,
    places_in,
    text_array,
    write_columns,
)
from pocl_dist.data.sources import Rows
from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    canonical_json,
    digest_of,
    read_json,
    sha256_file,
)
from pocl_dist.guards import inside
from pocl_dist.list_digest import ListDigest
from pocl_dist.records import Plan, Stage

if TYPE_CHECKING:
    import pyarrow as pa

# A longer ranking would make plan.json unreadable; it goes into a Parquet file beside it.
MAX_RANKING_IN_JSON = 100_000
RANKING_FILE = "plan-ranking.parquet"
_ID, _ROW = "example_id", "row"  # columns of the ranking file


class RankingFile(Texts):
    """The ids of a ranking in its file, and the rows' places among the training rows."""

    def __init__(self, path: Path, num_ranked: int, data_digest: JSONValue) -> None:
        self._path = path
        self._num_ranked = num_ranked
        self.data_digest = data_digest  # of the rows that the places are of

    def __len__(self) -> int:
        return self._num_ranked

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        return self._column[place]

    @cached_property
    def _column(self) -> TextColumn:
        import pyarrow as pa

        return TextColumn(join([batch.cast(pa.large_string()) for batch in self._batches(_ID)]))

    def _batches(self, column: str) -> Iterator[pa.Array]:
        for batch in open_parquet(self._path).iter_batches(columns=[column]):
            yield batch.column(0)

    def parts(self) -> Iterator[list[str]]:
        """Yields all ids, some at a time; the file is not held."""
        for batch in self._batches(_ID):
            yield batch.to_pylist()

    def rows(self) -> np.ndarray:
        """Returns the places, int32, in the order of the ranking.

        Raises MismatchError (78) for the file of an earlier version, which held ids alone.
        """
        import pyarrow.parquet as pq

        if _ROW not in pq.read_schema(self._path).names:
            raise MismatchError(
                f"{self._path} was made by an earlier version, without the places of its rows; "
                "remove plan.json and plan again: the same plan comes out"
            )
        rows = np.empty(len(self), dtype=np.int32)
        start = 0
        for batch in self._batches(_ROW):
            rows[start : start + len(batch)] = numbers_of(batch)
            start += len(batch)
        return rows


def ranked_rows(plan: Plan, rows: Rows) -> np.ndarray:
    """Returns the place among the rows (int32) of each ranked example, in the plan's order.

    Raises MismatchError (78) when the plan was made for other rows.
    """
    ranking = plan.ranking
    if isinstance(ranking, RankingFile):
        if ranking.data_digest != rows.digest:
            raise MismatchError(
                f"data.train: the plan was made for other rows than those of {rows.source}; remove "
                "plan.json and plan again"
            )
        return ranking.rows()
    ids = ranking.texts if isinstance(ranking, TextColumn) else text_array(ranking)
    places = places_in(rows.ids(), ids)
    if (places < 0).any():
        name = ranking[int(np.argmin(places))]
        raise MismatchError(
            f"data.train: the plan ranks row {name!r}, which {rows.source} does not hold; remove "
            "plan.json and plan again"
        )
    return places.astype(np.int32)


def plan_digest(plan: Plan) -> str:
    """Returns `digest.plan` of a checkpoint's inputs: the `digest_of` [ranking, stages]."""
    digest = ListDigest(before="[")
    digest.extend(plan.ranking)
    stages: list[JSONValue] = [cast("JSONValue", stage.to_json()) for stage in plan.stages]
    return digest.hexdigest(after=f",{canonical_json(stages)}]")


def write_plan(path: Path, plan: Plan, rows: np.ndarray, inputs: Mapping[str, JSONValue]) -> None:
    """Writes `plan.json`; `rows` are the places of the ranked examples among the training rows."""
    stages = [stage.to_json() for stage in plan.stages]
    ranking: dict[str, object]
    if len(plan.ranking) <= MAX_RANKING_IN_JSON:
        ranking = {"ranking": list(plan.ranking)}
    else:
        file, texts = path.with_name(RANKING_FILE), cast("TextColumn", plan.ranking).texts
        write_columns(
            file, len(rows), lambda part: {_ID: texts[part], _ROW: number_array(rows[part])}
        )
        ranking = {
            "ranking_file": RANKING_FILE,
            "ranking_sha256": sha256_file(file),
            "num_ranked": len(plan.ranking),
        }
    value = {"stages": stages, "inputs": dict(inputs), **ranking}
    atomic_write_json(path, {**value, "digest": digest_of(cast("JSONValue", value))})


def _read_ranking(path: Path, value: Mapping[str, JSONValue]) -> tuple[str, ...] | RankingFile:
    if "ranking" in value:
        return tuple(map(str, cast("list[JSONValue]", value["ranking"])))
    file = inside(path.parent, str(value["ranking_file"]), f"{path}: ranking_file")
    if not file.exists():
        raise MissingInputError(f"{path}: its ranking_file {file} is missing")
    if sha256_file(file) != value["ranking_sha256"]:
        raise MismatchError(f"{file} was changed after the plan was made (sha256 differs)")
    inputs = cast("dict[str, JSONValue]", value["inputs"])
    return RankingFile(file, int(cast("int", value["num_ranked"])), inputs["data.train sha256"])


def read_plan(path: Path) -> Plan:
    """Returns the plan in `plan.json`.

    Raises MissingInputError (66) without one, MismatchError (78) when it was
    changed after it was made.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist: run `pocl-dist plan` first")
    try:
        value = read_json(path)
        digest = value.pop("digest")
        if digest_of(value) != digest:
            raise MismatchError(
                f"{path} was changed after it was made (its digest differs); plan again"
            )
        stages = tuple(
            Stage.from_json(stage) for stage in cast("list[dict[str, object]]", value["stages"])
        )
        ranking = _read_ranking(path, value)
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{path} is not a plan: {error!r}") from error
    return Plan(ranking, stages)
