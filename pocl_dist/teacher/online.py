"""The teacher beside the student: frozen, in eval mode, partitioned over the ranks by ZeRO-3."""

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
from pocl_dist.models.sources import ModelFolder
from pocl_dist.records import IGNORE_INDEX, Batch, TeacherOutput

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class _Backbone(nn.Module):
    """Runs the backbone only: the head's product is formed chunk by chunk inside the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        return hidden_states(backbone_module(self.model), input_ids_BT, attention_mask_BT)  # type: ignore[arg-type]


class _WholeModel(nn.Module):
    """Runs backbone and head, for a head that is no linear map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        return full_logits(self.model, input_ids_BT, attention_mask_BT)


class OnlineTeacher:
    """A frozen causal LM that answers each micro-batch with the hidden states its head reads."""

    def __init__(
        self, source: ModelFolder, config: Config, rank: Rank, num_real_tokens: int
    ) -> None:
        """Loads and partitions the teacher. Collective.

        The weights go from the files straight into partitions (`zero.Init` through transformers),
        so that no rank ever holds the whole teacher.
        """
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        settings = teacher_engine_config(config, rank)
        marker = HfDeepSpeedConfig(settings)  # transformers looks for a living one while it loads
        model = load_model(source, torch_dtype(config.engine.dtype, rank.device))
        del marker
        model.requires_grad_(False)
        self.model = model
        self.num_real_tokens = num_real_tokens
        self.gives_logits = config.loss.full_logits
        engine, *_ = deepspeed.initialize(
            model=_WholeModel(model) if self.gives_logits else _Backbone(model),
            config=settings,
            dist_init_required=False,
        )
        self.engine: DeepSpeedEngine = engine
        self.engine.eval()
        if not self.gives_logits:
            check_head(model, num_real_tokens, gathered)

    @contextmanager
    def answer(self, batch: Batch) -> Iterator[TeacherOutput]:
        """Yields hidden states of positions with a label, and the head. Collective: ZeRO-3 gathers.

        The head is whole on every rank while the context lasts. With `loss.full_logits` it yields
        logits of the real tokens in their place.
        """
        is_label_BT = batch.labels_BT != IGNORE_INDEX
        with torch.no_grad():
            answer_BT_ = self.engine(batch.input_ids_BT, batch.attention_mask_BT)
            answer_N_ = answer_BT_[is_label_BT]
        if self.gives_logits:
            yield TeacherOutput(logits_NV=answer_N_[:, : self.num_real_tokens])
            return
        with gathered(head_module(self.model).parameters()):
            yield TeacherOutput(answer_N_, lm_head(self.model, self.num_real_tokens))
