"""Hub id, JSONL or Parquet -> Examples, with file and row in every complaint.

`datasets` by itself accepts nulls, duplicate ids and mixed types in silence and refuses broken
lines without naming them, so files are read here, strictly; hub ids go through `datasets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.errors import DataError, MissingInputError, UnavailableError
from pocl_dist.files import digest_of, package_file, sha256_bytes
from pocl_dist.guards import shown
from pocl_dist.records import Example

MAX_ROW_BYTES = 4 << 20
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    source: str
    row: int  # counted from 1: the line of a JSONL file
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """The usable rows of one source and what was left out."""

    source: str
    examples: tuple[Example, ...]
    bad_rows: tuple[BadRow, ...]
    digest: str  # over ids and content, in order

    def by_id(self) -> dict[str, Example]:
        """Returns {example id: example}, in file order."""
        return {example.example_id: example for example in self.examples}


class _BadRowError(ValueError):
    """Carries the reason of one bad row to the policy."""


# ------------------------------------------------------------------------------- one row -> Example


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _BadRowError("a key is given twice")
    return row


def parse_line(line: bytes) -> dict[str, object]:
    """Returns the JSON object of one line; raises ValueError with the reason."""
    if len(line) > MAX_ROW_BYTES:
        raise _BadRowError(f"longer than {MAX_ROW_BYTES} bytes")
    try:
        row = json.loads(
            line.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_refuse_repeated_keys
        )
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 at byte {error.start} of the row") from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise _BadRowError(f"not JSON (one object per line is expected): {problem}") from error
    except RecursionError as error:
        raise _BadRowError("nested too deeply") from error
    except MemoryError as error:
        raise _BadRowError("needs more memory than there is") from error
    except _BadRowError:
        raise
    except ValueError as error:  # Python's bound against quadratic time
        raise _BadRowError("a number has more than 4300 digits") from error
    if not isinstance(row, dict):
        raise _BadRowError(f"not a JSON object but {type(row).__name__}")
    return row


def _text(row: Mapping[str, object], name: str, can_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None:
        if can_be_empty and name not in row:
            return ""
        raise _BadRowError(
            f"lacks field {name!r}" if name not in row else f"field {name!r} is null"
        )
    if not isinstance(value, str):
        raise _BadRowError(f"field {name!r} is {type(value).__name__}, expected text")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise _BadRowError(f"field {name!r} holds a NUL or half a surrogate pair")
    if not value.strip() and not can_be_empty:
        raise _BadRowError(f"field {name!r} is empty")
    return value


def _references(row: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list):
        return (_text(row, name),)
    if not value:
        raise _BadRowError(f"field {name!r} is an empty list")
    return tuple(_text({name: item}, name) for item in value)


def _from_messages(row: Mapping[str, object]) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise _BadRowError("field 'messages' must be a list of at least a question and an answer")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise _BadRowError("field 'messages' holds something that is no object")
        turns.append((_text(message, "role"), _text(message, "content")))
    if turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise _BadRowError("field 'messages' must end with a user and then an assistant message")
    return Example("", turns[-2][1], "", (turns[-1][1],), tuple(turns[:-2]))


def parse_row(row: Mapping[str, object]) -> Example:
    """Returns the Example of a row, id possibly empty; raises ValueError with the reason."""
    if "messages" in row:
        example = _from_messages(row)
    elif "instruction" in row:
        context = _text(row, "input", can_be_empty=True)
        example = Example("", _text(row, "instruction"), context, _references(row, "output"))
    elif "prompt" in row:
        example = Example("", _text(row, "prompt"), "", _references(row, "response"))
    else:
        raise _BadRowError("lacks field 'instruction' (or 'prompt', or 'messages')")
    given = row.get("id")
    if given is None:
        return example
    if isinstance(given, bool) or not isinstance(given, str | int) or str(given).strip() == "":
        raise _BadRowError(f"field 'id' is {shown(given)}, expected text or a whole number")
    name = _text({"id": str(given)}, "id")
    return Example(name, example.prompt, example.context, example.references, example.history)


# ----------------------------------------------------------------------------------- source -> rows


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object] | _BadRowError]]:
    with path.open("rb") as handle:
        number = 0
        while line := handle.readline(MAX_ROW_BYTES + 1):
            number += 1
            is_too_long = len(line) > MAX_ROW_BYTES
            rest = line
            while is_too_long and rest and not rest.endswith(b"\n"):  # skipped without being held
                rest = handle.readline(MAX_ROW_BYTES)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not is_too_long and not line.strip():
                continue
            try:
                yield number, parse_line(line)
            except _BadRowError as error:
                yield number, error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, object] | _BadRowError]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}
    except (
        ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # damaged files raise any of these
        raise DataError(
            f"{path}: not a readable Parquet file, after row {number}: {error}"
        ) from error


def _hub_rows(source: str) -> Iterator[tuple[int, dict[str, object] | _BadRowError]]:
    import datasets

    name, _, split = source.partition("#")
    name, _, revision = name.partition("@")
    try:
        rows = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except (ConnectionError, OSError) as error:
        raise UnavailableError(
            f"data set {source!r} is no local file and the hub gave: {error}"
        ) from error
    except ValueError as error:
        raise DataError(f"data set {source!r}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield number, {key: value for key, value in row.items() if value is not None}


def rows_file(source: str, key: str) -> Path | None:
    """Returns the file that the config key `key` names, None for a data set of the hub.

    Raises MissingInputError (66) for what is neither, or may not be read.
    """
    try:
        path = package_file(source) if source.startswith("package:") else Path(source)
    except FileNotFoundError as error:
        raise MissingInputError(f"{key}: {source!r}: {error}") from error
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise MissingInputError(f"{key}: {source} may not be read (looked at {path.resolve()})")
        return path
    looks_like_hub_id = source.partition("@")[0].partition("#")[0].count("/") == 1
    if path.suffix in FILE_SUFFIXES or path.is_dir() or not looks_like_hub_id:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise MissingInputError(f"{key}: {source} {what} (looked at {path.resolve()})")
    return None


def _open(source: str, key: str) -> Iterator[tuple[int, dict[str, object] | _BadRowError]]:
    path = rows_file(source, key)
    if path is None:
        return _hub_rows(source)
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def read_rows(
    source: str,
    key: str,
    *,
    limit: int | None = None,
    on_bad_row: str = "fail",
    max_bad_rows: int = 100,
) -> Rows:
    """Returns the Examples of `source`; `key` is the config key that named it.

    A row without id gets a hash of its content, identical rows `-2`, `-3`. Raises DataError (65)
    with file and row for the first bad row, or, with `on_bad_row` "quarantine", for more than
    `max_bad_rows` of them; MissingInputError (66) for a file that is not there.
    """
    examples: list[Example] = []
    bad_rows: list[BadRow] = []
    row_of_id: dict[str, int] = {}
    num_same: dict[str, int] = {}
    for number, row in _open(source, key):
        if limit is not None and len(examples) == limit:
            break
        try:
            if isinstance(row, _BadRowError):
                raise row
            example = parse_row(row)
            if not example.example_id:
                example = _with_content_id(example, num_same)
            if example.example_id in row_of_id:
                raise _BadRowError(
                    f"id {shown(example.example_id)} is that of row "
                    f"{row_of_id[example.example_id]} too"
                )
        except _BadRowError as error:
            bad_rows.append(BadRow(source, number, str(error)))
            if on_bad_row == "fail":
                raise DataError(f"{bad_rows[-1]}") from None
            if len(bad_rows) > max_bad_rows:
                raise DataError(
                    f"{bad_rows[-1]} (bad row {len(bad_rows)}; data.max_bad_rows is {max_bad_rows})"
                ) from None
            continue
        row_of_id[example.example_id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{source}: no row left ({len(bad_rows)} bad rows)")
    digest = digest_of(
        [
            list(map(str, (e.example_id, e.prompt, e.context, e.references, e.history)))
            for e in examples
        ]
    )
    return Rows(source, tuple(examples), tuple(bad_rows), digest)


def _with_content_id(example: Example, num_same: dict[str, int]) -> Example:
    content = json.dumps([example.prompt, example.context, example.references, example.history])
    name = sha256_bytes(content.encode())[:16]
    num_same[name] = num_same.get(name, 0) + 1
    if num_same[name] > 1:
        name = f"{name}-{num_same[name]}"
    return Example(name, example.prompt, example.context, example.references, example.history)
