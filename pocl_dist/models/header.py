"""What a model's settings and file headers promise: layers, widths, positions, parameters, head.

For what must be known in seconds on a machine without torch's libraries or the memory for weights.
`loading` asks transformers the same and knows each architecture's defaults; here a key that is not
in the file is None.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, read_json
from pocl_dist.models.gguf_header import GGUFHeader, read_gguf_header
from pocl_dist.models.weight_files import TensorHeader, read_folder_headers

# The names under which architectures keep the same number.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
_POSITIONS = ("max_position_embeddings", "n_positions")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class ModelHeader:
    """What can be told of a model without its weights; None is what its files do not say."""

    origin: str
    model_type: str | None
    architecture: str | None
    num_layers: int | None
    hidden_size: int | None
    vocabulary_rows: int | None
    num_positions: int | None
    is_tied: bool | None
    settings: Mapping[str, JSONValue]
    tensors: tuple[TensorHeader, ...]

    @property
    def num_parameters(self) -> int:
        """Returns the elements of all tensors in the files; a tied head is in them once."""
        return sum(tensor.num_elements for tensor in self.tensors)

    def head(self) -> TensorHeader | None:
        """Returns the tensor that makes logits: a matrix with a row per token, None if unknown."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for name in by_name:
            is_head = name in _HEADS or name.endswith(tuple(f".{head}" for head in _HEADS))
            if is_head and len(by_name[name].shape) == 2:
                return by_name[name]
        if self.is_tied is False:
            return None
        rows = self.vocabulary_rows
        embeddings = [t for t in self.tensors if len(t.shape) == 2 and t.shape[0] == rows]
        return embeddings[0] if len(embeddings) == 1 else None


def read_model_header(path: Path, origin: str, key: str, has_weights: bool = True) -> ModelHeader:
    """Returns the header of a model folder or GGUF file, named by the config key `key`.

    Without weights (the settings of a hub id alone) it has no tensors. Raises MissingInputError
    (66) for files that are damaged, cut short or missing.
    """
    if path.is_file():
        return _from_gguf(read_gguf_header(path, key), origin)
    try:
        settings = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise MissingInputError(f"{key}: no usable model: {error}") from error
    inner = settings.get("text_config")
    text = {**settings, **inner} if isinstance(inner, dict) else settings
    architectures = settings.get("architectures")
    model_type = settings.get("model_type")
    tied = text.get("tie_word_embeddings")
    return ModelHeader(
        origin=origin,
        model_type=model_type if isinstance(model_type, str) else None,
        architecture=str(architectures[0]) if isinstance(architectures, list) else None,
        num_layers=_whole(text, _LAYERS),
        hidden_size=_whole(text, _WIDTHS),
        vocabulary_rows=_whole(text, ("vocab_size",)),
        num_positions=_whole(text, _POSITIONS),
        is_tied=tied if isinstance(tied, bool) else None,
        settings=text,
        tensors=tuple(read_folder_headers(path, key)) if has_weights else (),
    )


def _whole(settings: Mapping[str, JSONValue], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = settings.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _from_gguf(header: GGUFHeader, origin: str) -> ModelHeader:
    def whole(name: str) -> int | None:
        value = header.setting(name)
        return value if isinstance(value, int) else None

    tokens = header.values.get("tokenizer.ggml.tokens")
    return ModelHeader(
        origin=origin,
        model_type=str(header.values.get("general.architecture")),
        architecture=None,
        num_layers=whole("block_count"),
        hidden_size=whole("embedding_length"),
        vocabulary_rows=len(tokens) if isinstance(tokens, list) else whole("vocab_size"),
        num_positions=whole("context_length"),
        is_tied=not any(tensor.name == "output.weight" for tensor in header.tensors),
        settings={},
        tensors=tuple(header.tensors),
    )


@cache
def causal_model_types() -> frozenset[str]:
    """Returns the `model_type`s that the installed transformers has a causal language model for.

    Read from its source: importing it takes seconds and loads torch. Empty if it is not installed
    or keeps its list elsewhere.
    """
    name = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    source = transformers_file("models/auto/modeling_auto.py")
    if source is None:
        return frozenset()
    # Only the statement is parsed: the whole file takes ten times as long.
    _, found, rest = source.read_text(encoding="utf-8").partition(f"\n{name} = ")
    statement, ends, _ = rest.partition("\n)\n")
    if not found or not ends:
        return frozenset()
    call = ast.parse(f"{statement})", mode="eval").body
    try:
        pairs = ast.literal_eval(cast("ast.Call", call).args[0])
        return frozenset(str(model_type) for model_type, _ in pairs)
    except (AttributeError, IndexError, TypeError, ValueError):  # written in another way
        return frozenset()


def transformers_file(name: str) -> Path | None:
    """Returns a file of the installed transformers without importing it; None if not there."""
    spec = find_spec("transformers")
    folders = spec.submodule_search_locations if spec is not None else None
    paths = [Path(folder) / name for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)
