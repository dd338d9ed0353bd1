"""Splits a causal LM into backbone and LM head, for any architecture whose head is a linear map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from pocl_dist.errors import MismatchError
from pocl_dist.records import LMHead

WAY_OUT = "loss.full_logits: true trains it through its own logits"


def head_module(model: PreTrainedModel) -> nn.Linear:
    """Returns the linear map to the vocabulary; raises MismatchError (78) for another head."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise MismatchError(
            f"{type(model).__name__}: the head is {type(head).__name__}, "
            f"only a linear one is supported; {WAY_OUT}"
        )
    return head


def backbone_module(model: PreTrainedModel) -> nn.Module:
    """Returns the part of the model that ends with the hidden states the head reads."""
    backbone = model.base_model
    if backbone is model:
        raise MismatchError(
            f"{type(model).__name__}: the backbone cannot be told from the head; {WAY_OUT}"
        )
    return backbone


def lm_head(model: PreTrainedModel, num_real_tokens: int) -> LMHead:
    """Returns the head's parameters and scalars; `num_real_tokens` is the tokenizer's size.

    Under ZeRO-3 the weight is a partitioned parameter: the caller gathers it around its use.
    """
    head = head_module(model)
    scale = _setting(model, "logit_scale") or 1.0  # Cohere multiplies
    scale /= _setting(model, "logits_scaling") or 1.0  # Granite divides
    softcap = _setting(model, "final_logit_softcapping")  # Gemma
    return LMHead(head.weight, head.bias, scale, softcap, num_real_tokens)


def _setting(model: PreTrainedModel, name: str) -> float | None:
    """Returns a number of the model's config, or of the text config inside a multimodal one."""
    for config in (model.config, model.config.get_text_config()):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return None


def hidden_states(
    backbone: nn.Module,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the final hidden states (B, T, H), after the last norm: what the head reads.

    Rows padded on the right need no mask, causal attention never looks there. Positions that start
    anew within a row keep what is packed into it apart; a mask would switch that off.
    """
    packed = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    mask_BT = attention_mask_BT if position_ids_BT is None else None
    outputs = backbone(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, **packed)
    return cast("torch.Tensor", outputs.last_hidden_state)


def full_logits(
    model: nn.Module,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the model's own logits (B, T, V), whatever its head is, padding columns included.

    Mask and positions as in `hidden_states`.
    """
    packed = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    mask_BT = attention_mask_BT if position_ids_BT is None else None
    outputs = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, **packed)
    return cast("torch.Tensor", outputs.logits)


def head_logits(hidden_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Returns the logits (N, V_real) in fp32; for a few positions only (scoring, self-check)."""
    weight, bias = head.weight_VH[: head.num_real_tokens].float(), head.bias_V
    logits_NV = hidden_NH.float() @ weight.T
    if bias is not None:
        logits_NV = logits_NV + bias[: head.num_real_tokens].float()
    logits_NV = logits_NV * head.logit_scale
    return (
        logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)
    )


def check_head(
    model: PreTrainedModel,
    num_real_tokens: int,
    gather: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]] | None = None,
) -> None:
    """Raises MismatchError (78) when backbone + head do not give the model's own logits.

    Catches an architecture with a step between the two that `lm_head` does not know. Runs
    two forwards of four tokens. `gather` makes partitioned parameters whole (ZeRO-3);
    then all ranks call this.
    """
    parameter = next(model.parameters())
    ids_BT = torch.arange(4, device=parameter.device)[None] % num_real_tokens
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        expected = full_logits(model, ids_BT, mask_BT)[0, :, :num_real_tokens]
        hidden = hidden_states(backbone_module(model), ids_BT, mask_BT)[0]
        # After the forwards: these release what they gathered.
        with gather(head_module(model).parameters()) if gather else nullcontext():
            actual = head_logits(hidden, lm_head(model, num_real_tokens))
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 5e-2
    scale = float(expected.float().abs().max()) or 1.0
    if float((actual - expected.float()).abs().max()) > tolerance * scale:
        raise MismatchError(
            f"{type(model).__name__}: its logits are not a linear head over its hidden states; "
            + WAY_OUT
        )


_HAS_LINEAR_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_linear_head(model: PreTrainedModel, num_real_tokens: int) -> bool:
    """Returns whether backbone + head give the model's own logits; asked once per model."""
    if model not in _HAS_LINEAR_HEAD:
        try:
            check_head(model, num_real_tokens)
            _HAS_LINEAR_HEAD[model] = True
        except MismatchError:
            _HAS_LINEAR_HEAD[model] = False
    return _HAS_LINEAR_HEAD[model]
