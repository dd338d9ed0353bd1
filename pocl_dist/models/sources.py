"""Where a model lies: hub id, GGUF, package file or folder -> a local folder of safetensors.

Everything after this sees one form. GGUF is converted once into a cache outside the run directory.
No pickled weights are read, and no code of a model is run unless the config says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.errors import MissingInputError, RefusedError, UnavailableError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    digest_of,
    new_folder,
    package_file,
    read_json,
    require_free,
    sha256_file,
)
from pocl_dist.models.folder_checks import check_is_no_pickle, check_links, check_settings

MARKER = "pocl_dist.json"
ADAPTER_SETTINGS = "adapter_config.json"
_SETTINGS_FILES = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
# Hashing 140 GB of teacher at every start costs minutes; above this, sizes and headers must do.
FULL_HASH_BYTES = 4 << 30


@dataclass(frozen=True)
class ModelFolder:
    """A local folder that `from_pretrained` opens, and where it came from."""

    folder: Path
    origin: str
    trust_remote_code: bool = False
    commit: str | None = None
    adapter_digest: str | None = None  # of the adapter that was merged into the weights


def cache_folder() -> Path:
    """Returns the folder for converted models: $POCL_DIST_CACHE, or ~/.cache/pocl_dist."""
    given = os.environ.get("POCL_DIST_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "pocl_dist"


def _settings(file: Path, key: str) -> dict[str, JSONValue]:
    """Returns the settings in a JSON file of a model folder, none when the file is not there."""
    try:
        return read_json(file) if file.exists() else {}
    except ValueError as error:
        raise MissingInputError(f"{key}: no usable model: {error}") from error


def check_model_folder(folder: Path, key: str, trust_remote_code: bool) -> None:
    """Raises MissingInputError (66) or RefusedError (77) for a folder that is no usable model.

    Reads settings and the first bytes of the weights.
    """
    if (folder / ADAPTER_SETTINGS).exists():  # transformers would load another model in its place
        raise MissingInputError(
            f"{key}: {folder} holds an adapter ({ADAPTER_SETTINGS}); "
            f"name its base model here and the adapter as {key.rpartition('.')[0]}.adapter"
        )
    if not (folder / "config.json").is_file():
        raise MissingInputError(f"{key}: {folder} has no config.json: not a model folder")
    check_links(folder, key)
    weights = list(folder.glob("*.safetensors"))
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if not weights and pickled:
        raise RefusedError(
            f"{key}: {folder} holds only pickled weights ({pickled[0].name}), "
            "which can run code when loaded; "
            "convert them to safetensors (transformers: save_pretrained)"
        )
    if not weights:
        raise MissingInputError(f"{key}: {folder} holds no .safetensors file")
    for file in weights:
        check_is_no_pickle(file, key)
    settings = {name: _settings(folder / name, key) for name in _SETTINGS_FILES}
    check_settings(folder, key, settings, trust_remote_code)


def from_hub(
    path: str, revision: str | None, key: str, trust_remote_code: bool = False
) -> ModelFolder:
    """Returns the downloaded folder of a hub id (UnavailableError 69, MissingInputError 66)."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with hub_errors(path, revision, key):
        folder = Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=[*patterns, "*.py"] if trust_remote_code else patterns,
            )
        )
    return ModelFolder(folder, path, trust_remote_code, commit=folder.name)


@contextmanager
def hub_errors(path: str, revision: str | None, key: str) -> Iterator[None]:
    """Turns what the hub refuses into MissingInputError (66), UnavailableError (69)."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise MissingInputError(
            f"{key}: {path!r} is neither a local folder or file nor a hub id"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise UnavailableError(
            f"{key}: {path!r} is no local folder or file, and the hub could not be reached for it"
        ) from error
    except HfHubHTTPError as error:
        raise MissingInputError(
            f"{key}: the hub has no {path!r} (revision {revision}): {error}"
        ) from error


def _from_gguf(file: Path, origin: str, key: str) -> ModelFolder:
    """Converts a GGUF file to a safetensors folder in the cache, once per content."""
    folder = cache_folder() / f"gguf-{sha256_file(file)[:24]}"
    if (folder / MARKER).exists():
        return ModelFolder(folder, origin)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # readers of GGUF trust its counts and sizes: any error can come
        raise MissingInputError(
            f"{key}: {origin} is no usable GGUF file: {type(error).__name__}: {error}"
        ) from error
    config = loaded.config
    if hasattr(
        config, "quantization_config"
    ):  # the weights are dequantised now; saving would refuse
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    require_free(folder, sum(p.numel() * p.element_size() for p in plain.parameters()))
    # Another process may convert the same file meanwhile; both write the same.
    with new_folder(folder, keeps_existing=True) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        atomic_write_json(temporary / MARKER, {"origin": origin})
    return ModelFolder(folder, origin)


def local_model(path: str, key: str) -> Path | None:
    """Returns the folder or GGUF file that `path` names on this machine, None for a hub id.

    Raises MissingInputError (66) for what is neither.
    """
    try:
        local = package_file(path) if path.startswith("package:") else Path(path)
    except FileNotFoundError as error:
        raise MissingInputError(f"{key}: {path!r}: {error}") from error
    if local.is_file():
        if local.suffix != ".gguf":
            raise MissingInputError(
                f"{key}: {path} is a file but not GGUF; name the model's folder"
            )
        return local
    if local.is_dir():
        return local
    is_hub_id = path.count("/") == 1 and not path.startswith(".") and local.suffix != ".gguf"
    if local.is_absolute() or not is_hub_id:
        raise MissingInputError(f"{key}: {path} does not exist (looked at {local.resolve()})")
    return None


def find_model(
    path: str, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> ModelFolder:
    """Returns the local folder of a model named by the config key `key`.

    Raises MissingInputError (66), UnavailableError (69: hub not reachable) or RefusedError (77:
    pickled weights, or code of its own without `trust_remote_code`).
    """
    local = local_model(path, key)
    if local is not None and local.is_file():
        return _from_gguf(local, path, key)
    if local is not None:
        found = ModelFolder(local, path, trust_remote_code)
    else:
        found = from_hub(path, revision, key, trust_remote_code)
    check_model_folder(found.folder, key, trust_remote_code)
    return found


def model_digest(source: ModelFolder) -> str:
    """Returns a digest of config and weights: sha256 of files; above 4 GiB of sizes and headers.

    The digest of a merged adapter counts too: sizes and headers would not tell two of them apart.
    """
    files = sorted([source.folder / "config.json", *source.folder.glob("*.safetensors")])
    is_small = sum(file.stat().st_size for file in files) <= FULL_HASH_BYTES
    parts: dict[str, JSONValue] = {}
    if source.adapter_digest is not None:
        parts["adapter"] = source.adapter_digest
    for file in files:
        if is_small:
            parts[file.name] = sha256_file(file)
        else:
            with file.open("rb") as handle:
                parts[file.name] = [file.stat().st_size, handle.read(1 << 20).hex()]
    return digest_of(parts)
