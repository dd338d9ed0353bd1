"""A checkpoint -> a folder that plain `from_pretrained` opens, with tokenizer and model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_dist.config import LoRAConfig
from pocl_dist.distributed.checkpoint import WEIGHTS, Checkpoint
from pocl_dist.failpoints import failpoint
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    atomic_write_text,
    new_folder,
    require_free,
)
from pocl_dist.models.loading import load_model
from pocl_dist.models.lora import add_lora, merge_lora
from pocl_dist.models.sources import MARKER, ModelFolder
from pocl_dist.pipeline.card_names import FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "model."  # of the student inside the trained module


@torch.no_grad()
def copy_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Sets what is trained of `model` from the checkpoint, which must hold exactly that."""
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in checkpoint.tensors(WEIGHTS):
        targets.pop(name.removeprefix(PREFIX)).copy_(value)
    if targets:
        raise RuntimeError(f"{checkpoint.folder} lacks {', '.join(sorted(targets))}")


def student_from_checkpoint(
    source: ModelFolder,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    lora: LoRAConfig | None = None,
) -> PreTrainedModel:
    """Returns a plain model of the student's architecture with the checkpoint's weights.

    A checkpoint of a LoRA student holds adapters only: they are merged, in fp32, into `source`.
    """
    if lora is not None:
        model = load_model(source, torch.float32)
        add_lora(model, lora, seed=0)
        copy_weights(checkpoint, model)
        merge_lora(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval()
    settings = AutoConfig.from_pretrained(
        source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code
    )
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(settings), dtype=dtype, trust_remote_code=source.trust_remote_code
    )
    copy_weights(checkpoint, model)
    return cast("PreTrainedModel", model.eval())


def write_export(
    folder: Path,
    source: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    lora: LoRAConfig | None,
    card: str,
    made_from: dict[str, JSONValue],
) -> None:
    """Writes the export whole or not at all, reads it back, compares every weight. Rank 0 only.

    Raises WriteError (exit code 74) before anything is written when the disk is too full.
    """
    model = student_from_checkpoint(source, checkpoint, dtype, lora)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    expected = dict(model.named_parameters())
    require_free(folder, sum(value.numel() * value.element_size() for value in expected.values()))
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        atomic_write_text(temporary / FILE, card)
        atomic_write_json(temporary / MARKER, made_from)
        written = load_model(ModelFolder(temporary, str(folder), source.trust_remote_code), dtype)
        for name, value in written.named_parameters():
            if not torch.equal(value, expected[name]):
                raise RuntimeError(f"{temporary}: {name} was not read back as written")
        failpoint("export.before_rename")
