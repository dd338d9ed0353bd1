"""Scores a file of predictions against a file of data rows; needs no config, model or torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.data.row_form import parse_line
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import DataError, MissingInputError
from pocl_dist.metrics import ScoreSummary, score_answers

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prediction:
    """One row of a prediction file."""

    row: int  # counted from 1: the line of the file
    text: str
    given_id: str | None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield number, line


def read_predictions(path: Path) -> list[Prediction]:
    """Returns the rows `{"text"}` or `{"id", "text"}` of a JSONL file; an empty text is allowed.

    Raises DataError (65) naming file and line for a row that is anything else or repeats an id.
    """
    predictions: list[Prediction] = []
    row_of_id: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            row = parse_line(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        text, given = row.get("text"), row.get("id")
        if not isinstance(text, str):
            what = f"is {type(text).__name__}, expected text" if "text" in row else "is missing"
            raise DataError(f"{path}:{number}: field 'text' {what}")
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            raise DataError(
                f"{path}:{number}: field 'id' is {given!r}, expected text or a whole number"
            )
        given_id = None if given is None else str(given)
        if given_id is not None and given_id in row_of_id:
            raise DataError(
                f"{path}:{number}: id {given_id!r} is that of row {row_of_id[given_id]} too"
            )
        if given_id is not None:
            row_of_id[given_id] = number
        predictions.append(Prediction(number, text, given_id))
    if not predictions:
        raise DataError(f"{path}: holds no row")
    return predictions


def _all_have_ids(path: Path) -> bool:
    """Returns whether every data row brings an id of its own; content hashes are not the user's."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return "id" in table.column_names and table.column("id").null_count == 0
    return all(parse_line(line).get("id") is not None for _, line in _lines(path))


def _join_by_id(
    predictions: list[Prediction],
    references: dict[str, tuple[str, ...]],
    predictions_path: Path,
    references_path: Path,
) -> list[tuple[str, ...]]:
    for prediction in predictions:
        if prediction.given_id not in references:
            raise DataError(
                f"{predictions_path}:{prediction.row}: "
                f"id {prediction.given_id!r} is not in {references_path}"
            )
    given = {prediction.given_id for prediction in predictions}
    for number, example_id in enumerate(references, start=1):
        if example_id not in given:
            raise DataError(
                f"{references_path}: row {number}: id {example_id!r} "
                f"has no answer in {predictions_path}"
            )
    return [references[str(prediction.given_id)] for prediction in predictions]


def _join_by_line(
    predictions: list[Prediction],
    references: list[tuple[str, ...]],
    predictions_path: Path,
    references_path: Path,
) -> list[tuple[str, ...]]:
    if len(predictions) > len(references):
        first = predictions[len(references)]
        raise DataError(
            f"{predictions_path}:{first.row}: has no row to be compared with: "
            f"{len(predictions)} predictions, {references_path} has {len(references)} rows"
        )
    if len(predictions) < len(references):
        raise DataError(
            f"{references_path}: row {len(predictions) + 1} has no answer: {predictions_path} has "
            f"{len(predictions)} rows for {len(references)} "
            "(rows are joined by line unless all have ids)"
        )
    return references


def score_files(predictions_path: Path, references_path: Path) -> ScoreSummary:
    """Returns the mean scores of a prediction file, in percent.

    Rows are joined by id when every row of both files has one, else by line. Raises
    DataError (65) naming file and row when they do not fit together, MissingInputError (66)
    for a file that is not there.
    """
    for option, path in (("--predictions", predictions_path), ("--references", references_path)):
        if not path.is_file():
            raise MissingInputError(f"{option}: {path} does not exist (looked at {path.resolve()})")
    predictions = read_predictions(predictions_path)
    rows = read_rows(str(references_path), "--references")
    has_ids = all(p.given_id is not None for p in predictions) and _all_have_ids(references_path)
    if has_ids:
        by_id = {example.example_id: example.references for example in rows.examples}
        references = _join_by_id(predictions, by_id, predictions_path, references_path)
    else:
        in_order = [example.references for example in rows.examples]
        references = _join_by_line(predictions, in_order, predictions_path, references_path)
    return score_answers([prediction.text for prediction in predictions], references)
