"""A model by its config.json: how many parameters it has, and where. No weights are read.

h hidden size, q query heads times their size, kv the same of keys, f of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pocl_dist.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """What sets an architecture apart, as far as it changes sizes."""

    num_norms: int = 2  # in a layer
    has_rms_norm: bool = True
    has_fp32_norm: bool = False  # the scaled numbers are fp32, too
    norm_has_bias: bool = False
    is_gated: bool = True
    has_qkv_bias: bool = False  # also where `attention_bias` says nothing
    has_other_biases: bool = False
    has_head_bias: bool = False
    has_qk_norm: bool = False
    num_extra_positions: int | None = None  # of learned positions; None: none are learned
    ties_by_default: bool = False
    activation: str = "silu"


_CLASSIC = Family(
    has_rms_norm=False, norm_has_bias=True, is_gated=False, has_qkv_bias=True,
    has_other_biases=True, activation="gelu",
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "phi3": Family(),
    "qwen2": Family(has_qkv_bias=True),
    "qwen3": Family(has_qk_norm=True),
    "gemma": Family(has_fp32_norm=True, ties_by_default=True),
    "gemma2": Family(num_norms=4, has_fp32_norm=True, ties_by_default=True),
    "gemma3_text": Family(num_norms=4, has_fp32_norm=True, has_qk_norm=True, ties_by_default=True),
    "cohere": Family(num_norms=1, has_rms_norm=False, ties_by_default=True),
    "phi": replace(_CLASSIC, num_norms=1, has_head_bias=True, activation="gelu_new"),
    "gpt2": replace(_CLASSIC, num_extra_positions=0, ties_by_default=True, activation="gelu_new"),
    "opt": replace(_CLASSIC, num_extra_positions=2, ties_by_default=True, activation="relu"),
}
# Other names of a size in config.json, the usual one first.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model."""

    model_type: str
    num_layers: int
    hidden: int
    query: int
    kv: int
    ffn: int
    num_heads: int
    vocabulary: int  # rows of the embedding, padding included
    head_hidden: int  # of what the head reads: OPT-350m projects down
    is_tied: bool
    layer_matrices: int  # parameters of one layer that are multiplied with every token
    layer_vectors: int  # its biases and norms
    num_other: int  # embeddings, positions, last norm, head
    family: Family
    activation: str
    dropout: float = 0.0
    attention_dropout: float = 0.0
    has_softcap: bool = False  # of attention: no fused kernel knows it

    @property
    def num_parameters(self) -> int:
        """Returns all parameters, a tied head counted once."""
        return self.num_layers * (self.layer_matrices + self.layer_vectors) + self.num_other

    @property
    def num_matrix_parameters(self) -> int:
        """Returns the parameters that every token is multiplied with: those of the layers."""
        return self.num_layers * self.layer_matrices

    @property
    def head_parameters(self) -> int:
        """Returns the head's weight: vocabulary x hidden."""
        return self.vocabulary * self.head_hidden

    def with_layers(self, num_layers: int) -> ModelShape:
        """Returns the shape of the depth-pruned model."""
        return replace(self, num_layers=num_layers)


def _number(
    config: Mapping[str, object], what: str, origin: str, default: int | None = None
) -> int:
    for name in _NAMES[what]:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{origin}: {name}: {value!r} must be a whole number from 1")
            return value
    if default is None:
        raise ConfigError(f"{origin}: lacks {' or '.join(_NAMES[what])}")
    return default


def _fraction(config: Mapping[str, object], *names: str) -> float:
    for name in names:
        value = config.get(name)
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _family(config: Mapping[str, object], origin: str) -> tuple[str, Family]:
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{origin}: model_type: {model_type!r} is not known to estimate; "
            f"one of {', '.join(FAMILIES)} (the nearest gives an idea: --teacher or --student "
            "model_type=llama,hidden_size=...)"
        )
    for key in _EXPERTS:
        if config.get(key):
            raise ConfigError(f"{origin}: {key}: estimate knows no mixture of experts")
    return model_type, FAMILIES[model_type]


def shape_of(config: Mapping[str, object], origin: str) -> ModelShape:
    """Returns the shape that a config.json promises.

    Raises ConfigError (64) for a key that is missing or wrong, and for an unknown `model_type`;
    `origin` says whose config it is.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # of a model of text and images
        config = {**config, **text}
    model_type, family = _family(config, origin)
    hidden, heads = _number(config, "hidden", origin), _number(config, "heads", origin)
    kv_heads = _number(config, "kv_heads", origin, heads)
    size = _number(config, "head_size", origin, hidden // heads)
    ffn = _number(config, "ffn", origin, 4 * hidden)
    vocabulary = _number(config, "vocabulary", origin)
    query, kv = heads * size, kv_heads * size
    head_hidden = int(config.get("word_embed_proj_dim") or hidden)  # type: ignore[call-overload]
    has_attention_bias = bool(config.get("attention_bias"))
    qkv_bias = query + 2 * kv if family.has_qkv_bias or has_attention_bias else 0
    other_bias = hidden if family.has_other_biases or has_attention_bias else 0
    if family.has_other_biases or config.get("mlp_bias"):
        other_bias += hidden + ffn * (2 if family.is_gated else 1)
    norm = hidden * (2 if family.norm_has_bias else 1)
    is_tied = bool(config.get("tie_word_embeddings", family.ties_by_default))
    return ModelShape(
        model_type=model_type,
        num_layers=_number(config, "layers", origin),
        hidden=hidden,
        query=query,
        kv=kv,
        ffn=ffn,
        num_heads=heads,
        vocabulary=vocabulary,
        head_hidden=head_hidden,
        is_tied=is_tied,
        layer_matrices=2 * hidden * query
        + 2 * hidden * kv
        + hidden * ffn * (3 if family.is_gated else 2),
        layer_vectors=qkv_bias
        + other_bias
        + family.num_norms * norm
        + (2 * size if family.has_qk_norm else 0),
        num_other=_num_other(config, family, hidden, head_hidden, vocabulary, is_tied, origin),
        family=family,
        activation=str(
            config.get("hidden_activation")
            or config.get("hidden_act")
            or config.get("activation_function")
            or family.activation
        ),
        dropout=_fraction(config, "resid_pdrop", "dropout"),
        attention_dropout=_fraction(config, "attn_pdrop", "attention_dropout"),
        has_softcap=_fraction(config, "attn_logit_softcapping") > 0,
    )


def _num_other(
    config: Mapping[str, object],
    family: Family,
    hidden: int,
    head_hidden: int,
    vocabulary: int,
    is_tied: bool,
    origin: str,
) -> int:
    """Returns the parameters outside of the layers."""
    count = vocabulary * head_hidden * (1 if is_tied else 2)
    if family.has_head_bias:
        count += vocabulary
    if family.num_extra_positions is not None:
        count += hidden * (_number(config, "positions", origin) + family.num_extra_positions)
    if head_hidden != hidden:  # OPT's projections in and out
        count += 2 * hidden * head_hidden
    # OPT has a last norm only where its layers begin with theirs.
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
        count += hidden * (2 if family.norm_has_bias else 1)
    return count
