"""LoRA students: adapters put into a plain model, only they are trained, and merged at the end.

The model keeps its class: its layers are replaced in place (peft's `inject_adapter_in_model`), not
wrapped, so backbone, head, templates and generation are found as in any other model.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl_dist.config import LoRAConfig
from pocl_dist.errors import ConfigError
from pocl_dist.models.loading import empty_model
from pocl_dist.models.sources import ModelFolder

KEY = "models.student.lora.target_modules"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def target_names(model: PreTrainedModel, lora: LoRAConfig) -> list[str]:
    """Returns the full names of the layers to adapt: those that `target_modules` names, or all.

    Raises ConfigError (64) for a name that is no linear layer, or is the LM head: the loss takes
    the head's weight itself, and an adapter beside it would be left out.
    """
    head = model.get_output_embeddings()
    linear = [n for n, module in model.named_modules() if _is_linear(module) and module is not head]
    if lora.target_modules is None:
        return linear
    chosen: dict[str, None] = {}
    for target in lora.target_modules:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            allowed = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ConfigError(
                f"{KEY}: {target!r} is not allowed: linear layers of {type(model).__name__} "
                f"before its head are {allowed}"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def check_lora(source: ModelFolder, lora: LoRAConfig) -> None:
    """Raises ConfigError (64) for targets that the model does not have; reads no weights."""
    target_names(empty_model(source), lora)


def add_lora(model: PreTrainedModel, lora: LoRAConfig, seed: int) -> None:
    """Adds adapters to `model` and freezes the rest; the model's function is as before (B = 0).

    A is drawn from `seed` alone: the same on all ranks, and the caller's random state is kept.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = target_names(model, lora)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Adds each adapter's product to the weight beside it and removes the adapters, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)  # type: ignore[attr-defined]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
