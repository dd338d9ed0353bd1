"""The files under `difficulty/`: what measure writes and plan reads. Loads no torch.

inputs.json        what the scores are made from; written before the first shard
shard-00017.parquet  DifficultyRecords, sealed; the number is that of the shard's first batch
quarantine.jsonl   rows without a finite score, or that cannot be worked on, and why
ranking.parquet    scores, ranks and fused score of each row, easy to hard; written by plan
summary.json       counts and means; written last
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocl_dist.config import Config, select_keys
from pocl_dist.data.columns import number_array, text_array
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError, MismatchError
from pocl_dist.files import JSONValue, digest_of, sha256_file
from pocl_dist.models.sources import ModelFolder, model_digest
from pocl_dist.pipeline import quarantine
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.records import DifficultyRecord, RowFailure
from pocl_dist.shard_files import (
    count_halved,
    damage_of,
    remove_damaged,
    sealed_shards,
    write_shard,
)

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = "shard-*.parquet"
# Where a model comes from is named as well as its digest, so that a refusal can
# name a key of the config.
_INPUT_KEYS = (
    "models.student.path",
    "models.student.init_layers",
    "data.limit",
    "data.template",
    "data.max_tokens",
    "data.max_prompt_tokens",
    "generation",
    "measure.engine",
    "measure.server_url",
    "measure.server_model",
    "measure.server_prompt",
    "engine.dtype",
    "ray.cpus_per_actor",
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "*.model",
)


def config_keys(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that difficulty scores depend on."""
    keys = select_keys(config, _INPUT_KEYS)
    if config.models.student.path is None:
        keys |= select_keys(config, ["models.teacher.path"])
    return keys


def config_inputs(config: Config, rows: Rows) -> dict[str, JSONValue]:
    """Returns the config keys and the data digest that difficulty scores depend on."""
    return config_keys(config) | {"data.train sha256": rows.digest}


def model_inputs(key: str, source: ModelFolder) -> dict[str, JSONValue]:
    """Returns the digests of a model's weights and of its tokenizer's files."""
    files = {file for pattern in _TOKENIZER_FILES for file in source.folder.glob(pattern)}
    digests: dict[str, JSONValue] = {
        file.name: sha256_file(file) for file in files if file.is_file()
    }
    return {f"{key} sha256": model_digest(source), f"{key} tokenizer sha256": digest_of(digests)}


def is_scored(record: DifficultyRecord) -> bool:
    """Returns whether all signals of a record are finite."""
    return all(math.isfinite(getattr(record, name)) for name in SIGNALS)


# ------------------------------------------------------------------------------------------ Parquet


def write_difficulty(
    folder: Path, name: str, records: Sequence[DifficultyRecord], num_halved: int
) -> None:
    """Writes a shard of scores, a column per field, and seals it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def numbers(name: str, dtype: type[np.number]) -> pa.Array:
        values = [getattr(record, name) for record in records]
        return number_array(np.array(values, dtype=dtype))

    buffer = io.BytesIO()
    pq.write_table(
        pa.table(
            {
                "example_id": text_array(r.example_id for r in records).cast(pa.string()),
                **{s: numbers(s, np.float64) for s in SIGNALS},
                "num_response_tokens": numbers("num_response_tokens", np.int64),
                "answer": text_array(r.answer for r in records).cast(pa.string()),
            }
        ),
        buffer,
    )
    write_shard(folder / f"{name}.parquet", buffer.getvalue(), num_halved)


def remove_damaged_shards(folder: Path) -> list[str]:
    """Removes shards that are not as they were written; returns how that shows."""
    return remove_damaged(folder, SHARDS)


def count_halved_batches(folder: Path) -> int:
    """Returns how many batches did not fit into memory whole."""
    return count_halved(folder, SHARDS)


def read_shards(
    folder: Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[Path, pa.Table]]:
    """Yields the shards with their scores, all columns or those named, in the order of batches.

    Raises MismatchError (78) naming a shard that is not as it was written, DataError (65) for one
    that holds no scores.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    expected = sorted(field.name for field in fields(DifficultyRecord))
    for path in sealed_shards(folder, SHARDS):
        damage = damage_of(path)
        if damage is not None:
            raise MismatchError(f"{damage}; `pocl-dist measure` computes it again")
        try:
            file = pq.ParquetFile(path)
            found = sorted(file.schema_arrow.names)
            if found != expected:
                raise ValueError(f"fields {found} are not {expected}")
            table = file.read(columns=columns)
        except (ArrowException, ValueError) as error:
            raise DataError(
                f"{path}: no difficulty scores ({error}); remove it and measure again"
            ) from error
        yield path, table


def read_records(folder: Path) -> list[DifficultyRecord]:
    """Returns the records of all shards, in memory; raises as `read_shards` does."""
    tables = [table for _, table in read_shards(folder)]
    return [DifficultyRecord.from_json(row) for table in tables for row in table.to_pylist()]


# --------------------------------------------------------------------------------------- quarantine


def read_quarantine(folder: Path) -> dict[str, RowFailure]:
    """Returns {example id: why it has no score}."""
    return Quarantine(folder / quarantine.FILE, 0).read()


def not_finite(record: DifficultyRecord) -> RowFailure:
    """Returns why a record without a finite score cannot be ranked."""
    values = {name: getattr(record, name) for name in SIGNALS}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    return RowFailure(record.example_id, "not finite", ", ".join(bad))
