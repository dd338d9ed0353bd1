"""Keys and values of prompts, moved to where their answers go on.

Shapes: B rows, T positions, H hidden size, K heads of keys and D their size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from pocl_dist.models.heads import backbone_module


@dataclass
class Prompts:
    """What is left of the forward passes: where every answer starts from, row by row."""

    hidden_H: list[torch.Tensor]  # of the last position of each prompt
    lengths: list[int]
    layers: list[list[tuple[torch.Tensor, torch.Tensor]]]  # [row][layer]: keys, values (K, T, D)


def can_share_forward(model: PreTrainedModel) -> bool:
    """Returns whether keys and values of a prompt can be moved to where its answer goes on.

    So it is when each layer keeps its own, of all positions or a window, and positions are given.
    """
    if "position_ids" not in inspect.signature(backbone_module(model).forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    return (
        all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and set(kinds) <= {"full_attention", "sliding_attention"}
        and not getattr(model.config, "num_kv_shared_layers", 0)
    )


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come.

    Its base copies all that it holds for every new token: at 64 rows of 200 tokens twice the
    traffic of the weights of a small model.
    """

    def __init__(self, keys_BKTD: torch.Tensor, values_BKTD: torch.Tensor, num_held: int) -> None:
        super().__init__()
        self.dtype, self.device = keys_BKTD.dtype, keys_BKTD.device
        self.is_initialized = True
        self._room = (keys_BKTD, values_BKTD)
        self._show(num_held)

    def _show(self, num_held: int) -> None:
        self.keys, self.values = (tensor[:, :, :num_held] for tensor in self._room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the new positions (B, K, T, D) in place; returns all keys and values."""
        assert self.keys is not None and self.values is not None
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self._room[0][:, :, start:end] = key_states
        self._room[1][:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows only."""
        assert self.keys is not None
        num_held = self.keys.shape[2]
        self._room = (self._room[0][indices], self._room[1][indices])
        self._show(num_held)


def layers_of(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns keys and values (B, K, T, D) of each layer."""
    return cast("list[tuple[torch.Tensor, torch.Tensor]]", [pair[:2] for pair in cache])  # type: ignore[attr-defined]


def roomy_cache(prompts: Prompts, longest: int, room: int) -> Cache:
    """Returns a cache of all prompts, padded on the left to `longest`, and room for `room` tokens.

    Empties `prompts.layers` as it goes, so that no two copies of the whole exist.
    """
    layers: list[_RoomyLayer] = []
    while prompts.layers[0]:
        rows = [of_row.pop(0) for of_row in prompts.layers]
        num_heads, _, size = rows[0][0].shape
        shape = (len(rows), num_heads, longest + room, size)
        # Zeros, not empty: what is masked out must be finite all the same.
        keys_BKTD, values_BKTD = rows[0][0].new_zeros(shape), rows[0][1].new_zeros(shape)
        for row, (keys_KTD, values_KTD) in enumerate(rows):
            held = slice(longest - prompts.lengths[row], longest)
            keys_BKTD[row, :, held], values_BKTD[row, :, held] = keys_KTD, values_KTD
        layers.append(_RoomyLayer(keys_BKTD, values_BKTD, num_held=longest))
    return Cache(layers=layers)  # type: ignore[arg-type]
