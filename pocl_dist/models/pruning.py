"""Depth pruning: a student made of some of the teacher's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pocl_dist.errors import ConfigError
from pocl_dist.models.config_fit import check_layers
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder


def _layer_list_name(model: PreTrainedModel) -> str:
    num_layers = int(model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise ConfigError(
        f"models.student.init_layers: {type(model).__name__} keeps its layers "
        "in no list of its own; give models.student.path instead"
    )


def prune_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Returns a new model with the teacher's layers `layers`, embeddings, final norm and head."""
    num_layers = int(teacher.config.num_hidden_layers)
    check_layers(num_layers, layers)
    name = _layer_list_name(teacher)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and len(layer_types) == num_layers:
        config.layer_types = [layer_types[layer] for layer in layers]
    state = {}
    new_index = {old: new for new, old in enumerate(layers)}
    for key, value in teacher.state_dict().items():
        if not key.startswith(name + "."):
            state[key] = value
            continue
        old, _, rest = key[len(name) + 1 :].partition(".")
        if int(old) in new_index:
            state[f"{name}.{new_index[int(old)]}.{rest}"] = value
    student = type(teacher)._from_config(config, dtype=next(teacher.parameters()).dtype)
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return cast("PreTrainedModel", student.eval())


def write_pruned_student(teacher: ModelFolder, layers: Sequence[int], folder: Path) -> None:
    """Writes the pruned model (fp32 safetensors) and the teacher's tokenizer into `folder`."""
    student = prune_layers(load_model(teacher, torch.float32), layers)
    student.save_pretrained(folder)
    load_tokenizer(teacher).save_pretrained(folder)
