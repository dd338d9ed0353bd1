"""The files of `generate`: the teacher's answers as a data set. Loads no torch.

generated/inputs.json         what the answers are made from; written before the first shard
generated/shard-00017.json    {example id: answer}, sealed; the number is of the shard's first batch
generated/quarantine.jsonl    rows that the teacher could not be asked about, and why
generated/unusable.jsonl      these, and rows whose answer is empty or no text; not in the data set
generated/train.jsonl         the data set, rows in the order of `data.train` (`generate.output`)
generated/train.provenance.json   digests of what it was made from and of the file itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, compare_inputs, select_keys
from pocl_dist.data.row_form import parse_row
from pocl_dist.errors import DataError, MismatchError, MissingInputError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    read_json,
    sha256_file,
)
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Example, RowFailure

_INPUT_KEYS = (
    "models.teacher.path",
    "data.train",
    "data.limit",
    "data.template",
    "data.max_prompt_tokens",
    "generate.do_sample",
    "generate.temperature",
    "generate.top_p",
    "generate.no_repeat_ngram_size",
    "generate.seed",
    "generation",
    "engine.dtype",
    "ray.cpus_per_actor",
)


def config_inputs(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that the answers depend on."""
    return select_keys(config, _INPUT_KEYS)


def output_file(config: Config) -> Path:
    """Returns the data set's file."""
    if config.generate.output is not None:
        return Path(config.generate.output)
    return RunDirectory(Path(config.run_dir)).generated / "train.jsonl"


def _provenance_file(output: Path) -> Path:
    return output.with_suffix(".provenance.json")


def row_of(example: Example, answer: str) -> dict[str, object]:
    """Returns the row that is read back as `example` with `answer` as its only reference.

    Raises ValueError with the reason for an answer that no row can hold: none at all, or no text.
    """
    if example.history:
        turns = [*example.history, ("user", example.prompt), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        row: dict[str, object] = {"id": example.example_id, "messages": messages}
    else:
        row = {
            "id": example.example_id,
            "instruction": example.prompt,
            "input": example.context,
            "output": answer,
        }
    if not answer.strip():
        raise ValueError("the teacher's answer is empty")
    read = parse_row(row)
    assert read == Example(
        example.example_id, example.prompt, example.context, (answer,), example.history
    ), "a row is read back as another example"
    return row


# ------------------------------------------------------------------------------------- the data set


def write_data_set(
    config: Config,
    run: RunDirectory,
    examples: Sequence[Example],
    answers: Mapping[str, str],
    inputs: Mapping[str, JSONValue],
    failures: Mapping[str, RowFailure],
    num_halved: int = 0,
) -> list[dict[str, str]]:
    """Writes the rows in the order of `examples`, then the provenance; returns the unusable ones.

    `failures`: rows without an answer. `num_halved` batches did not fit into memory whole.
    Raises DataError (65) when more than `data.max_bad_rows`, or all, are unusable.
    """
    rows, unusable = [], []
    for example in examples:
        if example.example_id in failures:
            reason = failures[example.example_id].reason
            unusable.append({"example_id": example.example_id, "reason": reason})
            continue
        try:
            rows.append(row_of(example, answers[example.example_id]))
        except ValueError as error:
            unusable.append({"example_id": example.example_id, "reason": str(error)})
    if unusable:
        lines = [json.dumps(row) for row in unusable]
        atomic_write_text(run.generated / "unusable.jsonl", "\n".join(lines) + "\n")
    if len(unusable) > config.data.max_bad_rows or not rows:
        raise DataError(
            f"{run.generated / 'unusable.jsonl'}: {len(unusable)} of {len(examples)} answers of "
            f"the teacher cannot be trained on, the first ({unusable[0]['example_id']!r}): "
            f"{unusable[0]['reason']} (data.max_bad_rows is {config.data.max_bad_rows})"
        )
    output = output_file(config)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _provenance_file(output).unlink(missing_ok=True)  # never beside another file than its own
    atomic_write_text(output, text)
    provenance = {
        "inputs": dict(inputs),
        "sha256": sha256_file(output),
        "num_rows": len(rows),
        "num_unusable": len(unusable),
        "num_halved_batches": num_halved,
    }
    atomic_write_json(_provenance_file(output), provenance)
    return unusable


def is_written(config: Config, inputs: Mapping[str, JSONValue]) -> bool:
    """Returns whether the data set is there; raises MismatchError (78) for another one's file."""
    output = output_file(config)
    if not output.exists():
        return False
    record = _provenance_file(output)
    if not record.exists():
        raise MismatchError(
            f"generate.output: {output} is there already, without {record.name} beside it: "
            "another program made it; it is not overwritten"
        )
    _check_data_set(output, inputs)
    return True


def _check_data_set(output: Path, inputs: Mapping[str, JSONValue]) -> None:
    try:
        provenance = read_json(_provenance_file(output))
        made_from = cast("dict[str, JSONValue]", provenance["inputs"])
        sha256 = provenance["sha256"]
    except (KeyError, ValueError) as error:
        raise MismatchError(f"{_provenance_file(output)} is no provenance: {error}") from error
    compare_inputs({key: made_from.get(key) for key in inputs}, inputs, output)
    if sha256_file(output) != sha256:
        raise MismatchError(f"{output} was changed after it was generated (sha256 differs)")


def generated_data_set(config: Config) -> Path:
    """Returns the data set's file, made from this config as far as that shows without a model.

    Raises MissingInputError (66) when it is not there, MismatchError (78) when it was made from
    another config or was changed.
    """
    output = output_file(config)
    if not output.exists() or not _provenance_file(output).exists():
        raise MissingInputError(
            f"data.responses: {output} is not there: run `pocl-dist generate` first"
        )
    _check_data_set(output, config_inputs(config))
    return output
