"""Whether a config asks for what its models have: layers, positions, tokens. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.config import Config
from pocl_dist.errors import ConfigError


def check_layers(num_layers: int, layers: Sequence[int]) -> None:
    """Raises ConfigError (64) for a layer that a teacher of `num_layers` layers does not have."""
    if max(layers) >= num_layers:
        raise ConfigError(
            f"models.student.init_layers: {max(layers)} is not allowed: "
            f"the teacher has layers 0..{num_layers - 1}"
        )


def longest_sequences(config: Config) -> dict[str, int]:
    """Returns {the keys that make it: tokens} of the sequences that the steps build."""
    longest_prompt = config.data.max_prompt_tokens
    lengths = {
        "data.max_tokens": config.data.max_tokens,
        "data.max_prompt_tokens + generation.max_new_tokens": longest_prompt
        + config.generation.max_new_tokens,
    }
    if config.policy.mode != "off" and config.policy.max_new_tokens is not None:
        name = "data.max_prompt_tokens + policy.max_new_tokens"
        lengths[name] = longest_prompt + config.policy.max_new_tokens
    return lengths


def check_positions(config: Config, positions: int | None, key: str) -> None:
    """Raises ConfigError (64) when sequences would exceed a model's positions; it would crash.

    `positions`: None for a model that sets no bound.
    """
    if positions is None:
        return
    for name, tokens in longest_sequences(config).items():
        if tokens > positions:
            raise ConfigError(f"{name}: {tokens} is more than the {positions} positions of {key}")


def check_top_k(config: Config, num_real_tokens: int) -> None:
    """Raises ConfigError (64) when more tokens are to be kept than the tokenizer has."""
    if config.teacher.source == "cache_topk" and config.teacher.top_k > num_real_tokens:
        raise ConfigError(
            f"teacher.top_k: {config.teacher.top_k} is more than the {num_real_tokens} tokens "
            "of the vocabulary"
        )
