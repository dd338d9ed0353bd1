"""The student, from its files or a checkpoint, inside the engine that trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pocl_dist.config import Config
from pocl_dist.distributed.checkpoint import Checkpoint, restore_optimizer
from pocl_dist.distributed.engine import build_student_engine
from pocl_dist.distributed.process_group import Rank, torch_dtype
from pocl_dist.models.heads import check_head
from pocl_dist.models.loading import load_model
from pocl_dist.models.lora import add_lora
from pocl_dist.models.packing import check_packing
from pocl_dist.pipeline.export import copy_weights
from pocl_dist.pipeline.student import StudentWithLoss

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase

    from pocl_dist.models.sources import ModelFolder


def student_engine(
    config: Config,
    rank: Rank,
    student: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint | None,
) -> DeepSpeedEngine:
    """Returns the engine, weights and AdamW's state from the checkpoint if there is one.

    Collective.
    """
    model = load_model(student, torch.float32)
    lora = config.models.student.lora
    if lora is not None:
        add_lora(model, lora, config.seed)
    if checkpoint is not None:
        copy_weights(checkpoint, model)
    elif not config.loss.full_logits:
        check_head(model, len(tokenizer))
    if config.engine.packing:
        check_packing(model, len(tokenizer))
    if config.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = StudentWithLoss(model, config.loss, len(tokenizer), lora)
    dtype = torch_dtype(config.engine.dtype, rank.device)
    for parameter in module.parameters():
        # Not module.to(): buffers, such as the frequencies of RoPE, stay fp32, as from_pretrained
        # leaves them; in bf16 the angles would be off by 0.2 rad at position 511.
        parameter.data = parameter.data.to(dtype)
    engine = build_student_engine(module, config, rank)
    if checkpoint is not None:
        restore_optimizer(engine, checkpoint)
    return engine
