"""Whether a model keeps examples apart that are packed into one row."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from pocl_dist.errors import ConfigError
from pocl_dist.models.heads import backbone_module, hidden_states

_LENGTHS = (5, 3, 4)


def needs_one_row(model: PreTrainedModel) -> bool:
    """Returns whether the attention tells packed examples apart only in a batch of one row."""
    return str(model.config._attn_implementation).startswith("flash_attention")


def check_packing(model: PreTrainedModel, num_real_tokens: int) -> None:
    """Raises ConfigError (64) when packed examples see each other, or a position is not restarted.

    Compares hidden states of three short examples in one row with those of each alone. Under ZeRO-3
    all ranks call this.
    """
    backbone = backbone_module(model)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise ConfigError(
            f"engine.packing: true is not possible: {type(model).__name__} takes no position ids"
        )
    parameter = next(model.parameters())
    ids = torch.arange(sum(_LENGTHS), device=parameter.device) * 7 % num_real_tokens
    positions = torch.cat([torch.arange(length, device=ids.device) for length in _LENGTHS])
    with torch.no_grad():
        alone = [hidden_states(backbone, part[None], None)[0] for part in ids.split(_LENGTHS)]
        packed = hidden_states(backbone, ids[None], None, positions[None])[0]
    expected = torch.cat(alone).float()
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 5e-2
    scale = float(expected.abs().max()) or 1.0
    if float((packed.float() - expected).abs().max()) > tolerance * scale:
        raise ConfigError(
            f"engine.packing: true is not possible: {type(model).__name__} with "
            f"{model.config._attn_implementation} attention lets packed examples see each other"
        )
