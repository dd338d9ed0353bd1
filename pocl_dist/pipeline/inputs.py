"""What several steps need: rows, models and the encoder that a config names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.config import Config, ModelConfig, StudentConfig, select_keys
from pocl_dist.data.row_index import index_rows, open_index
from pocl_dist.data.sets import check_enough
from pocl_dist.data.sources import RowPolicy, Rows, read_rows
from pocl_dist.display.output import say
from pocl_dist.errors import RefusedError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    read_json,
    sha256_file,
)
from pocl_dist.guards import shown
from pocl_dist.pipeline.generated_files import generated_data_set
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_dist.data.encoding import Encoder
    from pocl_dist.distributed.process_group import Rank
    from pocl_dist.models.sources import ModelFolder


# Another value of these would make another run; `engine.world_size`, micro batch, ZeRO stage and
# offloading only change how it is computed.
RESULT_KEYS = (
    "seed",
    "models",
    "data.train",
    "data.limit",
    "data.responses",
    "data.dev",
    "data.dev_limit",
    "data.template",
    "data.max_tokens",
    "data.max_prompt_tokens",
    "curriculum",
    "dev.metric",
    "dev.every",
    "generation",  # of the dev metric
    "loss.name",
    "loss.kwargs",
    "loss.temperature_scaling",
    "optimizer",
    "policy",
    "engine.global_batch_size",
    "engine.dtype",
    "export",
)


COMMIT = re.compile(r"[0-9a-f]{40}")


def result_inputs(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that a run's result depends on.

    The exact cache is the same teacher as the online one: a run may go on with the other.
    """
    is_cut = config.teacher.source == "cache_topk"
    return {
        **select_keys(config, RESULT_KEYS),
        "teacher.top_k": config.teacher.top_k if is_cut else None,
    }


def _read(config: Config, source: str, key: str, limit: int | None) -> Rows:
    data = config.data
    return read_rows(
        source, key, limit=limit, on_bad_row=data.on_bad_row, max_bad_rows=data.max_bad_rows
    )


def read_prompts(config: Config, is_read: bool = False) -> Rows:
    """Returns the rows of `data.train`, which lie below `rows/` and are read one at a time.

    `is_read`: a step before has put them there, and nothing is written; ranks say so, for one
    process alone writes a file. Raises DataError (65) when there are fewer than stages.
    """
    data = config.data
    policy = RowPolicy(data.limit, data.on_bad_row, data.max_bad_rows)
    return check_enough(config, _read_big(config, data.train, "data.train", policy, is_read))


def read_train(config: Config, is_read: bool = False) -> Rows:
    """Returns the training rows: those of `data.train`, or of `generate` (`data.responses`).

    As `read_prompts`.
    """
    if config.data.responses == "references":
        return read_prompts(config, is_read)
    generated = str(generated_data_set(config))
    rows = _read_big(config, generated, "data.responses", RowPolicy(), is_read)
    return check_enough(config, rows)


def _read_big(config: Config, source: str, key: str, policy: RowPolicy, is_read: bool) -> Rows:
    folder = RunDirectory(Path(config.run_dir)).rows / key
    return (open_index if is_read else index_rows)(source, key, folder, policy)


def read_dev(config: Config) -> Rows | None:
    """Returns the dev rows, or None when the config names none."""
    if config.data.dev is None:
        return None
    return _read(config, config.data.dev, "data.dev", config.data.dev_limit)


def read_eval_sets(config: Config) -> dict[str, Rows]:
    """Returns {name: rows} of the test sets; the name is the file's, a repeated one gets `-2`."""
    sets: dict[str, Rows] = {}
    for index, source in enumerate(config.data.eval):
        stem = Path(source.partition("#")[0].partition("@")[0]).stem
        name, number = stem, 1
        while name in sets:
            number += 1
            name = f"{stem}-{number}"
        sets[name] = _read(config, source, f"data.eval.{index}", config.data.eval_limit)
    return sets


def write_quarantine(run: RunDirectory, all_rows: list[Rows]) -> int:
    """Lists the bad rows of all sources in `quarantine.jsonl`; returns how many there are."""
    bad = [row for rows in all_rows for row in rows.bad_rows]
    if bad:
        lines = [json.dumps({"source": b.source, "row": b.row, "reason": b.reason}) for b in bad]
        atomic_write_text(run.root / "quarantine.jsonl", "\n".join(lines) + "\n")
    return len(bad)


def _find_once(
    run: RunDirectory,
    key: str,
    path: str,
    revision: str | None,
    find: Callable[[str, str, str | None], ModelFolder],
) -> ModelFolder:
    """Returns what `find` finds; a hub id keeps the commit that the run first resolved it to.

    The commit stands in `models.json`: if the branch moves, a resumed run finds its own model.
    """
    record = run.root / "models.json"
    known = read_json(record) if record.exists() else {}
    asked: dict[str, JSONValue] = {"path": path, "revision": revision}
    entry = known.get(key)
    if isinstance(entry, dict) and {name: entry.get(name) for name in asked} == asked:
        commit = str(entry.get("commit"))
        if not COMMIT.fullmatch(commit):  # it becomes part of a path in the hub's cache
            raise RefusedError(f"{record}: {key} has the commit {shown(commit)}, which is none")
        return find(path, key, commit)
    found = find(path, key, revision)
    if found.commit is not None:
        atomic_write_json(record, {**known, key: {**asked, "commit": found.commit}})
    return found


def _model(run: RunDirectory, role: str, model: ModelConfig | StudentConfig) -> ModelFolder:
    """Returns the local folder of a model that is named by its path, its adapter merged."""
    from pocl_dist.models.sources import find_model

    assert model.path is not None, "the caller knows of students without a path"
    find = partial(find_model, trust_remote_code=model.trust_remote_code)
    found = _find_once(run, f"models.{role}.path", model.path, model.revision, find)
    if model.adapter is None:
        return found
    from pocl_dist.models.adapters import find_adapter, merge_adapter

    key = f"models.{role}.adapter"
    return merge_adapter(found, _find_once(run, key, model.adapter, None, find_adapter), key)


def teacher_source(config: Config, run: RunDirectory) -> ModelFolder | None:
    """Returns the teacher's local folder (downloaded, converted, merged), or None for SFT."""
    teacher = config.models.teacher
    return None if teacher is None else _model(run, "teacher", teacher)


def student_source(config: Config, run: RunDirectory) -> ModelFolder:
    """Returns the student's local folder: the given one, or the one that init-student made."""
    from pocl_dist.models.sources import ModelFolder

    student = config.models.student
    if student.path is None:
        layers = ",".join(map(str, student.init_layers or ()))
        return ModelFolder(
            run.init_student,
            f"layers {layers} of {config.models.teacher and config.models.teacher.path}",
        )
    return _model(run, "student", student)


def make_encoder(config: Config, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Returns the encoder for the config's template and lengths."""
    from pocl_dist.data.encoding import Encoder

    return Encoder(
        tokenizer, config.data.template, config.data.max_tokens, config.data.max_prompt_tokens
    )


def finished_record(config: Config, run: RunDirectory) -> dict[str, JSONValue]:
    """Returns what an export was made from, as far as it can be told without loading a model."""
    from pocl_dist.models.sources import model_digest

    teacher, dev = teacher_source(config, run), read_dev(config)
    return {
        **result_inputs(config),
        "plan sha256": sha256_file(run.plan),
        "digest.dev": None if dev is None else dev.digest,
        "digest.student": model_digest(student_source(config, run)),
        "digest.teacher": None if teacher is None else model_digest(teacher),
    }


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    what: str,
    rank: Rank,
) -> dict[str, EncodedExample]:
    """Returns {example id: tokens}; rank 0 tells how many rows were cut."""
    encoder = make_encoder(config, tokenizer)
    encoded = {example.example_id: encoder.encode(example) for example in examples}
    num_prompts = sum(item.is_prompt_cut for item in encoded.values())
    num_responses = sum(item.is_response_cut for item in encoded.values())
    if rank.is_main and num_prompts + num_responses:
        say(
            f"{what}: {num_prompts} prompts and {num_responses} responses cut, "
            f"of {len(encoded)} rows"
        )
    return encoded
