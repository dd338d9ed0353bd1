"""Count and lengths of the rows of `data.train`: from the file, or as the command line says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.cluster.estimate.model_files import config_file
from pocl_dist.cluster.estimate.workload import RowLength, Workload
from pocl_dist.config import Config
from pocl_dist.data.columns import open_parquet
from pocl_dist.data.row_form import parse_line, parse_row
from pocl_dist.errors import DataError, MissingInputError, UsageError
from pocl_dist.files import package_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocl_dist.records import Example

MAX_SAMPLE = 2000
"""Rows that are tokenised; of more, so many evenly spread ones."""

_BYTES_PER_TOKEN = 4  # of English text, where no tokenizer.json is at hand
_TEMPLATE_TOKENS = {"alpaca": 34, "short": 12, "chat": 20}


def given_workload(
    config: Config, num_rows: int, num_tokens: int, num_labels: int | None
) -> Workload:
    """Returns rows of one length, as the command line has them."""
    data = config.data
    num_tokens = min(num_tokens, data.max_tokens)
    labels = num_tokens // 2 if num_labels is None else num_labels
    if not 1 <= labels < num_tokens:
        raise UsageError(
            f"--response-tokens: {labels} must be from 1 to {num_tokens - 1}, "
            "less than the tokens of a row"
        )
    notes = [f"{num_rows:,} rows of {num_tokens} tokens, {labels} of them response, as given"]
    if num_labels is None:
        notes.append("half of a row is taken for response: --response-tokens")
    notes.append(
        f"padding and waiting: engine.max_waste, {config.engine.max_waste:.0%} of the work"
    )
    limit = data.limit
    rows = num_rows if limit is None else min(limit, num_rows)
    row = RowLength(num_tokens - 1, labels)
    longest = RowLength(data.max_tokens - 1, max(labels, data.max_tokens - data.max_prompt_tokens))
    return Workload(rows, (row,), longest, False, tuple(notes))


def read_workload(config: Config, num_rows: int | None) -> Workload:
    """Returns count and lengths of `data.train`, from a sample where it is long.

    Raises MissingInputError (66) when it is no file that can be opened here, DataError (65) for a
    row of the sample that is none.
    """
    path = _data_file(config)
    count, rows = _parquet_sample(path) if path.suffix == ".parquet" else _jsonl_sample(path)
    if not rows:
        raise DataError(f"{path}: no row")
    counter, note = _token_counter(config)
    lengths = tuple(_row_length(config, example, counter) for example in rows)
    notes = [note]
    total = count if num_rows is None else num_rows
    if config.data.limit is not None:
        total = min(total, config.data.limit)
    bound = config.data.max_tokens
    longest = RowLength(bound - 1, max(row.num_labels for row in lengths))
    if len(rows) == count:
        longest = RowLength(
            max(row.num_tokens for row in lengths), max(row.num_labels for row in lengths)
        )
    else:
        notes.append(
            f"lengths of {len(rows):,} of {count:,} rows; the longest is taken to be "
            f"data.max_tokens {bound}"
        )
    return Workload(total, lengths, longest, True, tuple(notes))


def _data_file(config: Config) -> Path:
    source = config.data.train
    hint = "give --rows and --tokens-per-row"
    try:
        path = package_file(source) if source.startswith("package:") else Path(source)
    except FileNotFoundError as error:
        raise MissingInputError(f"data.train: {source!r}: {error}; or {hint}") from error
    if not path.is_file():
        raise MissingInputError(
            f"data.train: {source} is no file here (looked at {path.resolve()}); {hint}"
        )
    return path


def _spread(count: int) -> set[int]:
    """Returns the numbers of the rows of the sample."""
    size = min(count, MAX_SAMPLE)
    return {index * count // size for index in range(size)}


def _jsonl_sample(path: Path) -> tuple[int, list[Example]]:
    """Returns the number of rows, and a sample; one line is held at a time."""
    with path.open("rb") as handle:
        count = sum(1 for line in handle if line.strip())
    wanted, rows = _spread(count), []
    for index, (number, line) in enumerate(_lines(path)):
        if index in wanted:
            try:
                rows.append(parse_row(parse_line(line)))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
    return count, rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parquet_sample(path: Path) -> tuple[int, list[Example]]:
    """Returns the number of rows, and a sample from the beginning of evenly spread row groups."""
    from pyarrow import ArrowException

    try:
        file = open_parquet(path)
        groups = sorted(
            {i * file.num_row_groups // 20 for i in range(20)} if file.num_row_groups else ()
        )
        each = -(-MAX_SAMPLE // max(1, len(groups)))
        values: list[dict[str, object]] = []
        for group in groups:
            batch = next(file.iter_batches(batch_size=each, row_groups=[group]), None)
            values += [] if batch is None else batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    rows = []
    for value in values[:MAX_SAMPLE]:
        try:
            rows.append(parse_row({k: v for k, v in value.items() if v is not None}))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    return int(file.metadata.num_rows), rows


def _token_counter(config: Config) -> tuple[Tokenizer | None, str]:
    """Returns the student's tokenizer (the library's own, without transformers), and a note."""
    student, teacher = config.models.student, config.models.teacher
    role, model = ("student", student) if student.path else ("teacher", teacher)
    try:
        assert model is not None and model.path is not None
        file = config_file(model.path, model.revision, role).parent / "tokenizer.json"
    except MissingInputError:
        file = Path("tokenizer.json of a model that is not here")
    if not file.is_file():
        return None, f"no tokenizer.json at hand: {_BYTES_PER_TOKEN} bytes are taken for a token"
    from tokenizers import Tokenizer

    return Tokenizer.from_file(
        str(file)
    ), f"lengths by {role}'s tokenizer, the template's words about"


def _count(text: str, tokenizer: Tokenizer | None) -> int:
    if tokenizer is None:
        return -(-len(text.encode()) // _BYTES_PER_TOKEN)
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _row_length(config: Config, example: Example, tokenizer: Tokenizer | None) -> RowLength:
    data = config.data
    template = data.template.replace("{prompt}", "")
    extra = _TEMPLATE_TOKENS.get(data.template) or _count(template, tokenizer)
    parts = [text for _, text in example.history] + [example.prompt, example.context]
    prompt = min(sum(_count(part, tokenizer) for part in parts) + extra, data.max_prompt_tokens)
    response = min(_count(example.references[0], tokenizer) + 1, data.max_tokens - prompt)
    return RowLength(prompt + response - 1, response)
