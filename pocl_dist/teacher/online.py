"""The teacher beside the student: frozen, in eval mode; ZeRO-3 partitions it over several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from pocl_dist.config import Config
from pocl_dist.distributed.engine import teacher_engine_config
from pocl_dist.distributed.parameters import gathered
from pocl_dist.distributed.process_group import Rank, torch_dtype
from pocl_dist.models.heads import (
    backbone_module,
    check_head,
    full_logits,
    head_module,
    hidden_states,
    lm_head,
)
from pocl_dist.models.loading import load_model
from pocl_dist.models.packing import check_packing
from pocl_dist.models.sources import ModelFolder
from pocl_dist.records import IGNORE_INDEX, Batch, TeacherOutput

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel


class _Backbone(nn.Module):
    """Runs the backbone only: the head's product is formed chunk by chunk inside the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None
    ) -> torch.Tensor:
        backbone = backbone_module(self.model)  # type: ignore[arg-type]
        return hidden_states(backbone, input_ids_BT, None, position_ids_BT)


class _WholeModel(nn.Module):
    """Runs backbone and head, for a head that is no linear map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None
    ) -> torch.Tensor:
        return full_logits(self.model, input_ids_BT, None, position_ids_BT)


def _partitioned(
    source: ModelFolder, config: Config, rank: Rank, dtype: torch.dtype
) -> tuple[PreTrainedModel, DeepSpeedEngine]:
    """Returns the teacher, shared by all ranks, and the engine that runs its backbone. Collective.

    The weights go from the files straight into partitions (`zero.Init` through transformers),
    so that no rank ever holds the whole teacher.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = teacher_engine_config(config, rank)
    marker = HfDeepSpeedConfig(settings)  # transformers looks for a living one while it loads
    model = load_model(source, dtype).requires_grad_(False)
    del marker
    engine, *_ = deepspeed.initialize(
        model=_answering(model, config), config=settings, dist_init_required=False
    )
    return model, engine


def _answering(model: PreTrainedModel, config: Config) -> nn.Module:
    """Returns the part of the teacher that is run."""
    return _WholeModel(model) if config.loss.full_logits else _Backbone(model)


class OnlineTeacher:
    """A frozen causal LM that answers each micro-batch with the hidden states its head reads."""

    def __init__(
        self, source: ModelFolder, config: Config, rank: Rank, num_real_tokens: int
    ) -> None:
        """Loads and partitions the teacher. Collective."""
        self.num_real_tokens = num_real_tokens
        self.gives_logits = config.loss.full_logits
        dtype = torch_dtype(config.engine.dtype, rank.device)
        if rank.world_size == 1 and config.teacher.offload_param == "none":
            # Nothing to share: ZeRO-3 would only copy each weight before each use (30 % slower).
            self.model = load_model(source, dtype).requires_grad_(False).to(rank.device)  # type: ignore[arg-type]
            self.answering: nn.Module = _answering(self.model, config)
        else:
            self.model, self.answering = _partitioned(source, config, rank, dtype)
        self.answering.eval()
        if not self.gives_logits:
            check_head(self.model, num_real_tokens, gathered)
        if config.engine.packing:
            check_packing(self.model, num_real_tokens)

    @contextmanager
    def answer(self, batch: Batch) -> Iterator[TeacherOutput]:
        """Yields hidden states of positions with a label, and the head. Collective: ZeRO-3 gathers.

        The head is whole on every rank while the context lasts. With `loss.full_logits` it yields
        logits of the real tokens in their place.
        """
        is_label_BT = batch.labels_BT != IGNORE_INDEX
        with torch.no_grad():
            answer_BT_ = self.answering(batch.input_ids_BT, batch.position_ids_BT)
            answer_N_ = answer_BT_[is_label_BT]
        if self.gives_logits:
            yield TeacherOutput(logits_NV=answer_N_[:, : self.num_real_tokens])
            return
        with gathered(head_module(self.model).parameters()):
            yield TeacherOutput(answer_N_, lm_head(self.model, self.num_real_tokens))
