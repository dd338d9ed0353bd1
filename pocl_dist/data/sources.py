"""A source of rows -> Examples with ids, and what becomes of rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_dist.data.columns import text_array
from pocl_dist.data.row_file import RowFile
from pocl_dist.data.row_form import BadRowError, parse_row
from pocl_dist.data.row_ids import ParsedRow, RowIds, content_of
from pocl_dist.data.row_streams import RowStream, open_rows
from pocl_dist.errors import DataError
from pocl_dist.files import JSONValue
from pocl_dist.list_digest import ListDigest
from pocl_dist.records import Example

if TYPE_CHECKING:
    import pyarrow as pa

# Rows that are held until their ids are known; also bounded by characters, for rows may be long.
MAX_HELD_ROWS = 20_000
MAX_HELD_CHARS = 16_000_000


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
    examples: Sequence[Example]
    bad_rows: tuple[BadRow, ...]
    digest: str  # over ids and content, in order

    def by_id(self) -> dict[str, Example]:
        """Returns {example id: example}, in file order; all rows in memory."""
        return {example.example_id: example for example in self.examples}

    def ids(self) -> pa.LargeStringArray:
        """Returns the ids of all rows, in their order."""
        if isinstance(self.examples, RowFile):
            return self.examples.ids()
        return text_array(example.example_id for example in self.examples)


@dataclass(frozen=True)
class RowPolicy:
    """How many rows are read, and what becomes of bad ones: `data.on_bad_row`, `max_bad_rows`."""

    limit: int | None = None
    on_bad_row: str = "fail"
    max_bad_rows: int = 100

    def check(self, bad_rows: Sequence[BadRow]) -> None:
        """Raises DataError (65) for the first of the rows that is too much."""
        if bad_rows and self.on_bad_row == "fail":
            raise DataError(f"{bad_rows[0]}")
        if len(bad_rows) > self.max_bad_rows:
            raise DataError(
                f"{bad_rows[self.max_bad_rows]} (bad row {self.max_bad_rows + 1}; "
                f"data.max_bad_rows is {self.max_bad_rows})"
            )


def usable_rows(
    stream: RowStream, policy: RowPolicy, bad_rows: list[BadRow]
) -> Iterator[ParsedRow]:
    """Yields the usable rows of a source with their ids, in order; adds the others to `bad_rows`.

    Rows are held a few thousand at a time. Raises DataError (65) as `RowPolicy.check` does, and
    when no row is left.
    """
    ids, held, num_held_chars, num_good = RowIds(), list[ParsedRow](), 0, 0

    def release() -> Iterator[ParsedRow]:
        for row in ids.give(held):
            if isinstance(row.example, BadRowError):
                bad_rows.append(BadRow(stream.source, row.number, str(row.example)))
                policy.check(bad_rows)
            else:
                yield row
        held.clear()

    for number, row in stream.rows():
        held.append(_parsed(number, row))
        num_held_chars += len(held[-1].content)
        is_last = policy.limit is not None and num_good + len(held) == policy.limit
        is_bad = isinstance(held[-1].example, BadRowError)
        if is_bad or is_last or len(held) == MAX_HELD_ROWS or num_held_chars > MAX_HELD_CHARS:
            num_held_chars = 0
            for good in release():
                num_good += 1
                yield good
            if num_good == policy.limit:
                break
    for good in release():
        num_good += 1
        yield good
    if not num_good:
        raise DataError(f"{stream.source}: no row left ({len(bad_rows)} bad rows)")


def _parsed(number: int, row: dict[str, object] | BadRowError) -> ParsedRow:
    if isinstance(row, BadRowError):
        return ParsedRow(number, row)
    try:
        example = parse_row(row)
    except BadRowError as error:
        return ParsedRow(number, error)
    return ParsedRow(number, example, content_of(example))


def digest_item(example: Example) -> JSONValue:
    """Returns what a row is in the digest of its source."""
    parts = (
        example.example_id,
        example.prompt,
        example.context,
        example.references,
        example.history,
    )
    return list(map(str, parts))


def read_rows(
    source: str,
    key: str,
    *,
    limit: int | None = None,
    on_bad_row: str = "fail",
    max_bad_rows: int = 100,
) -> Rows:
    """Returns the Examples of `source`, in memory; `key` is the config key that named it.

    A row without id gets a hash of its content, identical rows `-2`, `-3`. Raises DataError (65)
    with file and row for the first bad row, or, with `on_bad_row` "quarantine", for more than
    `max_bad_rows` of them; MissingInputError (66) for a file that is not there.
    """
    bad_rows: list[BadRow] = []
    examples: list[Example] = []
    digest = ListDigest()
    policy = RowPolicy(limit, on_bad_row, max_bad_rows)
    for row in usable_rows(open_rows(source, key), policy, bad_rows):
        assert isinstance(row.example, Example), "bad rows are not among the usable ones"
        examples.append(row.example)
        digest.add(digest_item(row.example))
    return Rows(source, tuple(examples), tuple(bad_rows), digest.hexdigest())
