"""A teacher inside an actor: answers rows once and writes its shards itself.

Hidden states are too large for Ray's object store; the driver gets the JSON about them only.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from pocl_dist.data.encoding import collate
from pocl_dist.distributed.process_group import torch_dtype
from pocl_dist.distributed.row_isolation import work_by_halves
from pocl_dist.errors import ConfigError, MismatchError
from pocl_dist.files import JSONValue, make_private
from pocl_dist.models.heads import backbone_module, check_head, hidden_states, lm_head
from pocl_dist.models.loading import load_model
from pocl_dist.models.sources import ModelFolder, model_digest
from pocl_dist.records import IGNORE_INDEX, Batch, RowFailure, TeacherOutput
from pocl_dist.teacher.cache_files import HEAD, CacheEntry
from pocl_dist.teacher.cache_work import CacheShard
from pocl_dist.teacher.cache_writer import CacheContent, ShardWriter, write_head
from pocl_dist.versions import check_same_versions, versions


@dataclass(frozen=True)
class CacheSettings:
    """What a worker is made from."""

    model: ModelFolder
    model_digest: str  # what `model_digest` has to give where the worker runs
    content: CacheContent
    num_real_tokens: int
    pad_id: int
    num_threads: int
    dtype_name: str | None  # engine.dtype
    num_devices: int  # teacher.devices_per_actor
    versions: Mapping[str, JSONValue] = field(default_factory=versions)  # of who started the pass


@dataclass(frozen=True)
class CacheResult:
    """What came of a shard: its file, None when no row was left, and the rows that failed."""

    entry: CacheEntry | None
    failures: tuple[RowFailure, ...]


class CacheWorker:
    """Loads the teacher and works off shards. A plain class: the pool makes an actor of it."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self._model: PreTrainedModel | None = None

    def start(self) -> str:
        """Loads the teacher in `engine.dtype`; returns the device that takes the token ids."""
        make_private()
        settings = self.settings
        check_same_versions(settings.versions)
        if model_digest(settings.model) != settings.model_digest:
            raise MismatchError(
                f"{settings.model.origin}: the weights in {settings.model.folder} on "
                f"{socket.gethostname()} are not those that the driver found there"
            )
        torch.set_num_threads(settings.num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch_dtype(settings.dtype_name, device)
        if settings.num_devices > 1:
            model = load_model(settings.model, dtype, device_map="auto")
            check_placed(model, settings.num_devices)
        else:
            model = load_model(settings.model, dtype).to(device)  # type: ignore[arg-type]
        check_head(model, settings.num_real_tokens)
        self._model = model
        return str(input_device(model))

    def cache(self, shard: CacheShard) -> CacheResult:
        """Writes what the teacher says of the shard's rows; returns what stands beside it."""
        model, settings = self._model, self.settings
        assert model is not None, "start() comes first"
        head = lm_head(model, settings.num_real_tokens)
        folder = settings.content.folder
        # Actors that find none at the same time write the same bytes.
        if settings.content.top_k is None and not (folder / f"{HEAD}.json").exists():
            write_head(folder, head)
        writer = ShardWriter(settings.content, shard)
        failures: list[RowFailure] = []
        num_halved = 0
        for batch in shard.batches:
            inputs = collate(batch.examples, settings.pad_id)
            ids = [example.example_id for example in batch.examples]
            found = work_by_halves(partial(row_hiddens, model, inputs), batch.rows, ids)
            if found.result_of_row:
                hiddens = [found.result_of_row[row] for row in sorted(found.result_of_row)]
                hidden_NH = torch.cat(hiddens).to(head.weight_VH.device)
                writer.add(TeacherOutput(hidden_NH, head))
            failures += found.failures
            num_halved += found.is_halved
        entry = writer.write({failure.example_id for failure in failures}, num_halved)
        return CacheResult(entry, tuple(failures))


def row_hiddens(model: PreTrainedModel, batch: Batch, rows: Sequence[int]) -> list[torch.Tensor]:
    """Returns, for each of `rows`, the hidden states (n, H) of its labelled positions."""
    part = batch.only(rows)
    with torch.no_grad():
        hidden_NH = label_hidden(model, part.to(input_device(model)))
    return list(hidden_NH.split((part.labels_BT != IGNORE_INDEX).sum(1).tolist()))


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where token ids go: to the embedding, when the model lies on several devices."""
    return next(model.get_input_embeddings().parameters()).device


def label_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Returns the hidden states (N, H) of the batch's labelled positions, row by row.

    No mask: rows are padded on the right, where causal attention never looks.
    """
    hidden_BTH = hidden_states(backbone_module(model), batch.input_ids_BT, None)  # type: ignore[arg-type]
    return hidden_BTH[(batch.labels_BT != IGNORE_INDEX).to(hidden_BTH.device)]


def check_placed(model: PreTrainedModel, num_devices: int) -> None:
    """Raises ConfigError (64) when weights found no place on the devices.

    accelerate then moves them to host memory or disk and back in every forward pass.
    """
    num_left = sum(parameter.device.type == "meta" for parameter in model.parameters())
    if num_left:
        raise ConfigError(
            f"teacher.devices_per_actor: {num_devices} devices do not hold the teacher: {num_left} "
            "of its tensors found no place; raise it, or set teacher.cache_engine: zero3"
        )
