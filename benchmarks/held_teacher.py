"""Stands in for the teacher cache: final hidden states of all rows, computed before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pocl_dist.config import Config
from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.distributed.process_group import Rank
from pocl_dist.models.heads import backbone_module, hidden_states, lm_head
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline import training
from pocl_dist.pipeline.inputs import make_encoder, read_train
from pocl_dist.records import IGNORE_INDEX, Batch, TeacherOutput


class HeldTeacher:
    """Answers a batch from what it computed at the start."""

    def __init__(self, source: ModelFolder, config: Config, rank: Rank, num_real: int) -> None:
        model = load_model(source, torch.float32)
        tokenizer = load_tokenizer(source)
        encoder = make_encoder(config, tokenizer)
        self.hidden: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for example in read_train(config).examples:
                batch = collate([encoder.encode(example)], pad_id_of(tokenizer))
                hidden = hidden_states(backbone_module(model), batch.input_ids_BT, None)
                self.hidden[example.example_id] = hidden[batch.labels_BT != IGNORE_INDEX].clone()
        self.head = lm_head(model, num_real)

    @contextmanager
    def answer(self, batch: Batch) -> Iterator[TeacherOutput]:
        """Yields the states of the batch's labels, in their order."""
        yield TeacherOutput(torch.cat([self.hidden[i] for i in batch.example_ids]), self.head)


def hold_teacher() -> None:
    """Puts the held teacher in the place of the online one."""
    training.OnlineTeacher = HeldTeacher  # type: ignore[misc,assignment]
