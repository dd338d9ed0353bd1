"""The files under `difficulty/`: what measure writes and plan reads. Loads no torch.

inputs.json        what the scores are made from; written before the first shard
shard-00017.parquet  DifficultyRecords, sealed; the number is that of the shard's first batch
quarantine.jsonl   rows without a finite score, or that cannot be worked on, and why
ranking.parquet    RankedExamples, easy to hard; written by plan
summary.json       counts and means; written last
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.config import Config, select_keys
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError, MismatchError
from pocl_dist.files import JSONValue, atomic_write, digest_of, sha256_file
from pocl_dist.models.sources import ModelFolder, model_digest
from pocl_dist.pipeline import quarantine
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.records import DifficultyRecord, JSONRecord, RowFailure
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


def _column(kind: str, values: Sequence[object]) -> pa.Array:
    """Returns an Arrow column from its bytes: made from a list, it would import pandas (0.4 s)."""
    import numpy as np
    import pyarrow as pa

    if kind == "str":
        texts = [str(value).encode() for value in values]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(
            len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))
        )
    dtype, arrow_type = (np.float64, pa.float64()) if kind == "float" else (np.int64, pa.int64())
    numbers = np.asarray(values, dtype=dtype)
    return pa.Array.from_buffers(arrow_type, len(numbers), [None, pa.py_buffer(numbers)])


def _parquet(columns: Mapping[str, tuple[str, Sequence[object]]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _column(kind, values) for name, (kind, values) in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def write_columns(path: Path, columns: Mapping[str, tuple[str, Sequence[object]]]) -> None:
    """Writes {name: (kind: str, float or int; values)} as a Parquet file, whole or not at all."""
    data = _parquet(columns)
    atomic_write(path, lambda handle: handle.write(data))


def _columns_of(
    record_class: type[JSONRecord], records: Sequence[JSONRecord]
) -> dict[str, tuple[str, Sequence[object]]]:
    """Returns one column per field."""
    # Annotations are text here (`from __future__ import annotations` in records.py).
    kinds = {field.name: str(field.type) for field in fields(record_class)}
    return {name: (kind, [getattr(r, name) for r in records]) for name, kind in kinds.items()}


def write_records(
    path: Path, record_class: type[JSONRecord], records: Sequence[JSONRecord]
) -> None:
    """Writes records as a Parquet file with one column per field."""
    write_columns(path, _columns_of(record_class, records))


def write_difficulty(
    folder: Path, name: str, records: Sequence[DifficultyRecord], num_halved: int
) -> None:
    """Writes a shard of scores and seals it."""
    data = _parquet(_columns_of(DifficultyRecord, records))
    write_shard(folder / f"{name}.parquet", data, num_halved)


def remove_damaged_shards(folder: Path) -> list[str]:
    """Removes shards that are not as they were written; returns how that shows."""
    return remove_damaged(folder, SHARDS)


def count_halved_batches(folder: Path) -> int:
    """Returns how many batches did not fit into memory whole."""
    return count_halved(folder, SHARDS)


def read_records(folder: Path) -> list[DifficultyRecord]:
    """Returns the records of all shards, in the order of their batches.

    Raises MismatchError (78) naming a shard that is not as it was written, DataError (65) for one
    that holds no scores, or a row twice.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    records: dict[str, DifficultyRecord] = {}
    for path in sealed_shards(folder, SHARDS):
        damage = damage_of(path)
        if damage is not None:
            raise MismatchError(f"{damage}; `pocl-dist measure` computes it again")
        try:
            rows = pq.ParquetFile(path).read().to_pylist()
            found = [DifficultyRecord.from_json(row) for row in rows]
        except (ArrowException, ValueError) as error:
            raise DataError(
                f"{path}: no difficulty scores ({error}); remove it and measure again"
            ) from error
        for record in found:
            if record.example_id in records:
                raise DataError(
                    f"{path}: row {record.example_id!r} is in another shard too; measure anew"
                )
            records[record.example_id] = record
    return list(records.values())


# --------------------------------------------------------------------------------------- quarantine


def read_quarantine(folder: Path) -> dict[str, RowFailure]:
    """Returns {example id: why it has no score}."""
    return Quarantine(folder / quarantine.FILE, 0).read()


def not_finite(record: DifficultyRecord) -> RowFailure:
    """Returns why a record without a finite score cannot be ranked."""
    values = {name: getattr(record, name) for name in SIGNALS}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    return RowFailure(record.example_id, "not finite", ", ".join(bad))
