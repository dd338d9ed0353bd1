"""A model inside an actor: answers batches, and scores them for the difficulty signals."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.difficulty.signals import SIGNALS, AnsweredBatch
from pocl_dist.difficulty.work import WorkBatch, WorkShard
from pocl_dist.distributed.process_group import torch_dtype
from pocl_dist.distributed.row_isolation import work_by_halves
from pocl_dist.errors import MismatchError
from pocl_dist.files import JSONValue, make_private
from pocl_dist.models.generation import Sampling, generate_answers, mean_cross_entropies
from pocl_dist.models.greedy import AnsweredRow, answer_and_score
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder, model_digest
from pocl_dist.records import DifficultyRecord, RowFailure
from pocl_dist.versions import check_same_versions, versions

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is made from."""

    model: ModelFolder
    model_digest: str  # what `model_digest` has to give where the worker runs
    sampling: Sampling
    num_threads: int
    dtype_name: str | None = None  # engine.dtype
    versions: Mapping[str, JSONValue] = field(default_factory=versions)  # of who started the pass


@dataclass(frozen=True)
class ShardResult(Generic[T]):
    """What came of a shard, or of a part of one."""

    value_of_id: dict[str, T]  # of all rows asked for but those that failed
    failures: tuple[RowFailure, ...]
    num_halved: int  # batches that did not fit into memory whole


class ModelWorker:
    """Loads one model and works off shards. A plain class: the pool makes an actor of it."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def start(self) -> str:
        """Loads the model in `engine.dtype`; returns the device.

        Not in `__init__`: an error there reaches the driver without its class.
        """
        make_private()
        check_same_versions(self.settings.versions)
        self._check_model()
        torch.set_num_threads(self.settings.num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch_dtype(self.settings.dtype_name, device)
        self._tokenizer = load_tokenizer(self.settings.model)
        self._model = load_model(self.settings.model, dtype).to(device)  # type: ignore[arg-type]
        return str(device)

    def _check_model(self) -> None:
        """Raises MismatchError (78) when the folder is not what the driver saw.

        It is that of another node, or has new weights.
        """
        source = self.settings.model
        if model_digest(source) != self.settings.model_digest:
            raise MismatchError(
                f"{source.origin}: the weights in {source.folder} on {socket.gethostname()} "
                "are not those that the driver found there"
            )

    def answer(self, shard: WorkShard) -> ShardResult[str]:
        """Returns the model's answer to every row of the shard."""
        return self._work(partial(self._answers, pass_seed=shard.seed), shard)

    def measure(self, shard: WorkShard) -> ShardResult[DifficultyRecord]:
        """Returns the difficulty of every row of the shard; a signal may be non-finite here."""
        return self._work(self._measure_rows, shard)

    def _work(
        self, work: Callable[[WorkBatch, Sequence[int]], list[T]], shard: WorkShard
    ) -> ShardResult[T]:
        values: dict[str, T] = {}
        failures: list[RowFailure] = []
        num_halved = 0
        for batch in shard.batches:
            ids = [example.example_id for example in batch.examples]
            found = work_by_halves(partial(work, batch), batch.rows, ids)
            values |= {ids[row]: value for row, value in found.result_of_row.items()}
            failures += found.failures
            num_halved += found.is_halved
        return ShardResult(values, tuple(failures), num_halved)

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        assert self._model is not None and self._tokenizer is not None, "start() comes first"
        return self._model, self._tokenizer

    def _answers(self, batch: WorkBatch, rows: Sequence[int], pass_seed: int) -> list[str]:
        model, tokenizer = self._loaded()
        sampling = replace(self.settings.sampling, seed=batch.seed(pass_seed))
        prompts = [row.prompt_ids for row in batch.examples]
        return generate_answers(model, tokenizer, prompts, sampling, rows)

    def _measure_rows(self, batch: WorkBatch, rows: Sequence[int]) -> list[DifficultyRecord]:
        model, tokenizer = self._loaded()
        found = self._answered_rows(batch, rows)
        examples = [batch.examples[row] for row in rows]
        answers = [row.answer for row in found]
        cross_entropies = [row.cross_entropy for row in found]
        references = [batch.references[row] for row in rows]
        answered = AnsweredBatch(model, tokenizer, examples, references, answers, cross_entropies)
        columns = {name: signal.compute(answered) for name, signal in SIGNALS.items()}
        return [
            DifficultyRecord(
                example_id=example.example_id,
                num_response_tokens=example.num_response_tokens,
                answer=answers[index],
                **{name: values[index] for name, values in columns.items()},
            )
            for index, example in enumerate(examples)
        ]

    def _answered_rows(self, batch: WorkBatch, rows: Sequence[int]) -> list[AnsweredRow]:
        model, tokenizer = self._loaded()
        inputs = collate(batch.examples, pad_id_of(tokenizer))
        if batch.answers is None:
            max_new_tokens = self.settings.sampling.max_new_tokens
            return answer_and_score(model, tokenizer, batch.examples, inputs, max_new_tokens, rows)
        cross_entropies = mean_cross_entropies(model, inputs.only(rows), len(tokenizer))
        answers = [batch.answers[row] for row in rows]
        return [AnsweredRow(*pair) for pair in zip(answers, cross_entropies, strict=True)]
