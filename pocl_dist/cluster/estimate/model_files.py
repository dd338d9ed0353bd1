"""Where a model's sizes stand: a config.json, the headers beside it, or keys that are given.

No weights are read: of a safetensors file its header alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from pocl_dist.cluster.estimate.shapes import ModelShape, shape_of
from pocl_dist.config import Config
from pocl_dist.errors import ConfigError, MissingInputError, UnavailableError
from pocl_dist.files import package_file, read_json, sha256_file
from pocl_dist.models.folder_checks import LONGEST_HEADER_BYTES
from pocl_dist.models.sources import cache_folder

_HINT = (
    "estimate needs sizes only: give --{role} a config.json, its folder, or keys "
    "(model_type=llama,hidden_size=4096,num_hidden_layers=32,num_attention_heads=32,vocab_size=32000)"
)


def parse_shape(text: str, role: str) -> ModelShape:
    """Returns the shape of `--teacher` or `--student`: a folder, a config.json, or key=value,...

    Raises ConfigError (64) for keys that make no shape, MissingInputError (66) without a file.
    """
    path = Path(text)
    if path.is_dir() or path.suffix in (".json", ".yaml", ".yml"):
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise MissingInputError(f"--{role}: {file} does not exist")
        return shape_of(_read_config(file, f"--{role}"), f"--{role}: {file}")
    if "=" not in text:
        raise MissingInputError(f"--{role}: {text} does not exist; {_HINT.format(role=role)}")
    keys: dict[str, object] = {"model_type": "llama"}
    for part in text.split(","):
        name, found, value = part.partition("=")
        if not found or not name.strip():
            raise ConfigError(f"--{role}: {part!r} must be key=value, the key as in config.json")
        keys[name.strip()] = yaml.safe_load(value)
    return shape_of(keys, f"--{role}")


def _read_config(file: Path, key: str) -> Mapping[str, object]:
    try:
        return read_json(file)
    except ValueError as error:
        if file.suffix == ".json":
            raise MissingInputError(f"{key}: no usable model: {error}") from error
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {file} must hold the keys of a config.json")
    return value


def teacher_shape(config: Config) -> ModelShape | None:
    """Returns the shape of `models.teacher`; None for SFT."""
    teacher = config.models.teacher
    if teacher is None:
        return None
    return _shape(teacher.path, teacher.revision, "teacher")


def student_shape(config: Config, teacher: ModelShape | None) -> ModelShape:
    """Returns the shape of `models.student`; with `init_layers` that of the pruned teacher."""
    student = config.models.student
    if student.path is not None:
        return _shape(student.path, student.revision, "student")
    assert teacher is not None and student.init_layers is not None, "checked with the config"
    if max(student.init_layers) >= teacher.num_layers:
        raise ConfigError(
            f"models.student.init_layers: {max(student.init_layers)} is not allowed: "
            f"the teacher has layers 0..{teacher.num_layers - 1}"
        )
    return teacher.with_layers(len(student.init_layers))


def _shape(path: str, revision: str | None, role: str) -> ModelShape:
    key = f"models.{role}.path"
    file = config_file(path, revision, role)
    shape = shape_of(_read_config(file, key), f"{key}: {file}")
    counted = header_parameters(file.parent, shape.is_tied)
    if counted is not None and counted != shape.num_parameters:
        raise ConfigError(
            f"{key}: {file.parent}: its config.json promises {shape.num_parameters:,} parameters, "
            f"the headers of its weights hold {counted:,}: not a model of a plain "
            f"{shape.model_type}; {_HINT.format(role=role)}"
        )
    return shape


def config_file(path: str, revision: str | None, role: str) -> Path:
    """Returns the config.json of a model that a config names.

    Raises MissingInputError (66) where there is none, UnavailableError (69) when it would have to
    be fetched from the hub and that cannot be reached.
    """
    key, hint = f"models.{role}.path", _HINT.format(role=role)
    try:
        local = package_file(path) if path.startswith("package:") else Path(path)
    except FileNotFoundError as error:
        raise MissingInputError(f"{key}: {path!r}: {error}; {hint}") from error
    if local.is_file() and local.suffix == ".gguf":
        local = cache_folder() / f"gguf-{sha256_file(local)[:24]}"  # where `run` converts it to
        if not local.is_dir():
            raise MissingInputError(f"{key}: {path} was not converted yet (`run` does); {hint}")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise MissingInputError(f"{key}: {local} has no config.json: not a model folder")
        return local / "config.json"
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise MissingInputError(
            f"{key}: {path} does not exist (looked at {local.resolve()}); {hint}"
        )
    return _from_hub(path, revision, key, hint)


def _from_hub(path: str, revision: str | None, key: str, hint: str) -> Path:
    """Returns the config.json of a hub id, from the cache or fetched: a few hundred bytes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except HFValidationError as error:
        raise MissingInputError(
            f"{key}: {path!r} is neither a local folder nor a hub id; {hint}"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise UnavailableError(
            f"{key}: {path!r} is no local folder, is not in the hub's cache, and the hub could not "
            f"be reached for its config.json; {hint}"
        ) from error
    except HfHubHTTPError as error:
        raise MissingInputError(f"{key}: the hub has no {path!r}: {error}; {hint}") from error


def header_parameters(folder: Path, is_tied: bool) -> int | None:
    """Returns the parameters that the headers of a folder's safetensors tell; None without any.

    A tied head that is stored beside the embedding counts once.
    """
    tensors: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= _header_sizes(file)
    if not tensors:
        return None
    head = [name for name in tensors if name.endswith("lm_head.weight")]
    if is_tied and head and any(name.endswith(_EMBEDDINGS) for name in tensors):
        del tensors[head[0]]
    return sum(size for name, size in tensors.items() if not name.endswith(_NO_PARAMETERS))


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
# Buffers that older checkpoints of GPT-2 and Llama hold.
_NO_PARAMETERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def _header_sizes(file: Path) -> dict[str, int]:
    """Returns {tensor: elements} of a safetensors file; MissingInputError for a damaged one."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length) if length <= LONGEST_HEADER_BYTES else b""
    try:
        header = json.loads(text)
        sizes = {}
        for name, about in header.items():
            if name != "__metadata__":
                sizes[name] = 1
                for extent in about["shape"]:
                    sizes[name] *= int(extent)
        return sizes
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MissingInputError(f"{file}: no safetensors header: {error!r}") from error
