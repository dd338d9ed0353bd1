"""Opens a model folder: its tokenizer, what its config promises, its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from pocl_dist.errors import MissingInputError, RefusedError
from pocl_dist.files import JSONValue, digest_of

disable_progress_bar()  # bars of "Loading weights" from every rank hide what matters

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from pocl_dist.models.sources import ModelFolder


def load_tokenizer(source: ModelFolder) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model folder; raises MissingInputError (66) when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # the Rust reader raises plain Exception, others what they like
        raise MissingInputError(
            f"{source.origin}: no usable tokenizer in {source.folder}: {error}"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def _model_config(source: ModelFolder) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # a field of another type gives any error
        raise MissingInputError(
            f"{source.origin}: no usable model in {source.folder}: {error}"
        ) from error
    return cast("PretrainedConfig", config)


def num_layers(source: ModelFolder) -> int:
    """Returns the layers that a model's config promises; no weights are read."""
    return int(_model_config(source).num_hidden_layers)


def hidden_size(source: ModelFolder) -> int:
    """Returns the width of the hidden states that a model's head reads."""
    config = _model_config(source).get_text_config()
    # OPT-350m projects its hidden states down to its embedding's width.
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def vocabulary_rows(source: ModelFolder) -> int:
    """Returns the rows of a model's head, padding of the vocabulary included."""
    return int(_model_config(source).get_text_config().vocab_size)


def num_positions(source: ModelFolder) -> int | None:
    """Returns the longest sequence a model's config promises, or None when it sets no bound."""
    positions = getattr(_model_config(source), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def empty_model(source: ModelFolder) -> PreTrainedModel:
    """Returns the causal language model of a folder without weights, to look at its modules."""
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _model_config(source), trust_remote_code=source.trust_remote_code
        )
    return cast("PreTrainedModel", model)


def load_model(
    source: ModelFolder, dtype: torch.dtype, device_map: str | dict[str, str] | None = None
) -> PreTrainedModel:
    """Returns the causal language model of a folder, from safetensors only, in eval mode.

    `device_map` (transformers', e.g. "auto") spreads its layers over the visible devices.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            device_map=device_map,
        )
    except (OSError, SafetensorError) as error:
        raise MissingInputError(
            f"{source.origin}: no usable model in {source.folder}: {error}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise RefusedError(f"{source.origin}: {error}") from error
        raise MissingInputError(
            f"{source.origin}: no usable model in {source.folder}: {error}"
        ) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    # transformers fills what a file lacks with random numbers and goes on.
    missing = sorted(info["missing_keys"])
    if missing:
        raise MissingInputError(
            f"{source.origin}: {source.folder} lacks {len(missing)} weights "
            f"of {type(model).__name__} (first: {', '.join(missing[:3])})"
        )
    return model.eval()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of what makes two tokenizers the same: vocabulary and eos."""
    vocabulary = cast("dict[str, JSONValue]", dict(tokenizer.get_vocab()))
    return digest_of([vocabulary, tokenizer.eos_token_id])  # type: ignore[list-item]
