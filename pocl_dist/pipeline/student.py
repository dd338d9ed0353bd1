"""The trained module: student and loss in one forward, as a ZeRO-3 engine needs it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from pocl_dist.config import LoRAConfig, LossConfig
from pocl_dist.distributed.parameters import whole_parameters
from pocl_dist.losses import DistillationLoss, distillation_loss, get_divergence
from pocl_dist.losses.full_logits import full_logits_loss
from pocl_dist.models.heads import (
    backbone_module,
    full_logits,
    head_module,
    hidden_states,
    lm_head,
)
from pocl_dist.models.lora import add_lora, merge_lora
from pocl_dist.records import IGNORE_INDEX, Batch, TeacherOutput

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class StudentWithLoss(nn.Module):
    """Backbone, head and distillation loss. `temperature` and `kd_ratio` are for the next forward.

    The head's weight is used by the loss, outside its own module: registering it as an
    external parameter makes ZeRO-3 gather it for this module's forward and reduce the
    gradient that the loss gives it. With `loss.full_logits` the model's own head is used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: LossConfig,
        num_real_tokens: int,
        lora: LoRAConfig | None = None,
    ) -> None:
        super().__init__()
        import deepspeed

        self.model = model
        self.loss = loss
        self.divergence = get_divergence(loss.name, **loss.kwargs)
        self.num_real_tokens = num_real_tokens
        self.lora = lora  # what `add_lora` made of the model
        self.temperature = 1.0
        self.kd_ratio = 1.0
        if loss.full_logits:
            return
        for parameter in head_module(model).parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None,
        labels_BT: torch.Tensor,
        teacher: TeacherOutput,
        position_ids_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (loss sum with gradient, [kd, ce, kl] sums without) of a micro-batch's labels."""
        if self.loss.full_logits:
            logits_BTV = full_logits(self.model, input_ids_BT, attention_mask_BT, position_ids_BT)
            return self._from_full_logits(logits_BTV, labels_BT, teacher)
        is_label_BT = labels_BT != IGNORE_INDEX
        hidden_BTH = hidden_states(
            backbone_module(self.model), input_ids_BT, attention_mask_BT, position_ids_BT
        )
        # Boolean indexing keeps the graph also when nothing is selected: an empty micro-batch goes
        # through backward like any other.
        result = distillation_loss(
            hidden_BTH[is_label_BT],
            lm_head(self.model, self.num_real_tokens),
            teacher.hidden_NH,
            teacher.head,
            labels_BT[is_label_BT],
            self.divergence,
            self.temperature,
            self.kd_ratio,
            teacher_top_k=teacher.top_k,
            temperature_scaling=self.loss.temperature_scaling,
            chunk_size=self.loss.chunk_tokens,
            compile_mode=self.loss.compile,
        )
        return _sums(result)

    def _from_full_logits(
        self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor, teacher: TeacherOutput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_label_BT = labels_BT != IGNORE_INDEX
        result = full_logits_loss(
            logits_BTV[is_label_BT][:, : self.num_real_tokens],
            teacher.logits_NV,
            labels_BT[is_label_BT],
            self.divergence,
            self.temperature,
            self.kd_ratio,
            temperature_scaling=self.loss.temperature_scaling,
            chunk_size=self.loss.chunk_tokens,
        )
        return _sums(result)


def _sums(result: DistillationLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss sum with gradient, [kd, ce, kl] sums without)."""
    parts = torch.stack([result.kd_loss_sum, result.ce_loss_sum, result.kl_sum])
    return result.loss_sum, parts.double()


def plain_copy(engine: DeepSpeedEngine) -> PreTrainedModel:
    """Returns an unpartitioned copy of the student as it now is, in eval mode. Collective.

    Each parameter is gathered once; after that every rank generates at its own pace, without
    collectives. Adapters are merged, as in the export.
    """
    module = engine.module
    assert isinstance(module, StudentWithLoss)
    reference = next(module.model.parameters())
    # A bare config is right here: this model is made outside of zero.Init and filled at once.
    copied = type(module.model)._from_config(
        copy.deepcopy(module.model.config), dtype=reference.dtype
    )
    copied = copied.to(reference.device)
    if module.lora is not None:
        add_lora(copied, module.lora, seed=0)
    targets = dict(copied.named_parameters())
    with torch.no_grad():
        for name, value in whole_parameters(module.model):
            targets[name].copy_(value)
    if module.lora is not None:
        merge_lora(copied)
    copied.generation_config = module.model.generation_config
    return copied.eval()


def batch_arguments(batch: Batch) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Returns (ids, mask, labels) as `StudentWithLoss.forward` takes them of a batch.

    No mask: rows are padded on the right, and without one attention takes its causal kernel.
    """
    return batch.input_ids_BT, None, batch.labels_BT
