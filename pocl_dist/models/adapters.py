"""LoRA adapters that others trained: found, checked and merged into their base model, once.

Everything after this sees a plain model folder: ZeRO-3 loading, Ray actors and caches know nothing
of adapters. Like a converted GGUF file, the merged model lies in the cache of `sources`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pocl_dist.errors import MismatchError, MissingInputError, RefusedError, StorageError
from pocl_dist.files import (
    atomic_write_json,
    digest_of,
    free_bytes,
    new_folder,
    package_file,
    read_json,
    sha256_file,
)
from pocl_dist.models.folder_checks import check_is_no_pickle, check_links
from pocl_dist.models.sources import (
    ADAPTER_SETTINGS,
    MARKER,
    ModelFolder,
    cache_folder,
    from_hub,
    model_digest,
)

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
# Largest difference of logits, relative to the largest logit, that merging in fp32 may make.
TOLERANCE = 1e-4


def find_adapter(path: str, key: str, revision: str | None = None) -> ModelFolder:
    """Returns the local folder of the adapter named by the config key `key`.

    A hub id may end in `@REVISION`; `revision` wins over it. Raises MissingInputError (66),
    UnavailableError (69: hub not reachable) or RefusedError (77: pickled weights).
    """
    try:
        local = package_file(path) if path.startswith("package:") else Path(path)
    except FileNotFoundError as error:
        raise MissingInputError(f"{key}: {path!r}: {error}") from error
    if local.is_dir():
        found = ModelFolder(local, path)
    elif local.exists() or local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise MissingInputError(f"{key}: {path} is no folder (looked at {local.resolve()})")
    else:
        name, _, given = path.partition("@")
        found = from_hub(name, revision or given or None, key)
    if not (found.folder / ADAPTER_SETTINGS).is_file():
        raise MissingInputError(f"{key}: {found.folder} has no {ADAPTER_SETTINGS}: not an adapter")
    check_links(found.folder, key)
    if (found.folder / WEIGHTS).is_file():
        check_is_no_pickle(found.folder / WEIGHTS, key)
        return found
    if (found.folder / PICKLED_WEIGHTS).is_file():
        raise RefusedError(
            f"{key}: {found.folder} holds only pickled weights ({PICKLED_WEIGHTS}), which can run "
            "code when loaded; save the adapter as safetensors (peft: save_pretrained)"
        )
    raise MissingInputError(f"{key}: {found.folder} has no {WEIGHTS}")


def adapter_digest(adapter: ModelFolder) -> str:
    """Returns a digest of an adapter's settings and weights."""
    return digest_of(
        {name: sha256_file(adapter.folder / name) for name in (ADAPTER_SETTINGS, WEIGHTS)}
    )


def merge_adapter(base: ModelFolder, adapter: ModelFolder, key: str) -> ModelFolder:
    """Returns a folder of the base model with the adapter merged in, in fp32; made once.

    Its name is the digest of both, so another adapter, also at the same path, is another model.
    Raises MismatchError (78) when they do not fit, StorageError (74) when the disk is too full;
    nothing is left behind then.
    """
    digest = adapter_digest(adapter)
    small_files = sorted(path for path in base.folder.glob("*.json") if path.is_file())
    made_from = [model_digest(base), digest, *(sha256_file(path) for path in small_files)]
    folder = cache_folder() / f"adapter-{digest_of(list(made_from))[:24]}"
    merged = ModelFolder(
        folder, f"{base.origin} + {adapter.origin}", base.trust_remote_code, base.commit, digest
    )
    if (folder / MARKER).exists():
        return merged
    with _alone(folder):
        if not (folder / MARKER).exists():
            with new_folder(folder) as temporary:
                _write_merged(base, adapter, temporary, key)
                atomic_write_json(temporary / MARKER, {"origin": merged.origin})
    return merged


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of this machine work on `folder`: eight ranks must not load eight bases."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f".lock-{folder.name}"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write_merged(base: ModelFolder, adapter: ModelFolder, folder: Path, key: str) -> None:
    """Writes the merged model and the base's tokenizer; compares its logits with the adapter's."""
    import torch

    from pocl_dist.models.loading import load_model, load_tokenizer

    adapted = _adapted(load_model(base, torch.float32), adapter, key)
    with torch.no_grad():
        wanted = _probe(cast("PreTrainedModel", adapted))
        try:
            merged = cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))
        except ValueError as error:  # weights that are not finite
            raise MismatchError(f"{key}: {adapter.origin} cannot be merged: {error}") from error
        needed = sum(value.numel() * value.element_size() for value in merged.parameters())
        if free_bytes(folder.parent) < needed:
            raise StorageError(
                f"{key}: the merged model needs {needed} bytes, "
                f"{free_bytes(folder.parent)} are free at {folder.parent} ($POCL_DIST_CACHE)"
            )
        merged.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
        del adapted, merged
        written = ModelFolder(folder, f"{key}, merged", base.trust_remote_code)
        difference = float((_probe(load_model(written, torch.float32)) - wanted).abs().max())
    if not difference <= TOLERANCE * (float(wanted.abs().max()) or 1.0):
        raise MismatchError(
            f"{key}: merged into {base.origin}, {adapter.origin} gives other logits (by "
            f"{difference:.3g}) than beside it: it changes a weight that the model uses twice, "
            "as a tied embedding"
        )


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Returns the logits of eight tokens."""
    import torch

    ids_BT = torch.arange(8)[None] % int(model.config.get_text_config().vocab_size)
    logits = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
    return cast("torch.Tensor", logits)


def _lora_settings(adapter: ModelFolder, key: str) -> LoraConfig:
    """Returns the adapter's settings; raises MismatchError (78) when it is no LoRA."""
    from peft import LoraConfig

    try:
        kind = read_json(adapter.folder / ADAPTER_SETTINGS).get("peft_type")
    except ValueError as error:
        raise MissingInputError(f"{key}: no usable adapter: {error}") from error
    if kind != "LORA":
        raise MismatchError(f"{key}: {adapter.origin} is of type {kind}; only LORA can be merged")
    try:
        settings = cast("LoraConfig", LoraConfig.from_pretrained(str(adapter.folder)))
    except (TypeError, ValueError) as error:
        raise MismatchError(f"{key}: {adapter.origin} has unusable settings: {error}") from error
    if settings.megatron_config:  # peft would import the module that the file names
        raise RefusedError(f"{key}: {adapter.origin} sets megatron_config, which names code to run")
    settings.inference_mode = True
    return settings


def _adapted(base: PreTrainedModel, adapter: ModelFolder, key: str) -> PeftModel:
    """Returns the base model with the adapter beside its weights, in eval mode.

    peft leaves out what does not fit, with a warning at most; here every tensor must find its
    place, and every place its tensor (MismatchError, 78).
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _lora_settings(adapter, key)
    try:
        weights = load_file(adapter.folder / WEIGHTS)
    except SafetensorError as error:
        raise MissingInputError(
            f"{key}: {adapter.folder / WEIGHTS} is not readable: {error}"
        ) from error
    misfit = f"{key}: {adapter.origin} does not fit {type(base).__name__}"
    try:
        adapted = PeftModel(base, settings)
        missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        missing -= set(weights)
        loaded = set_peft_model_state_dict(adapted, weights)
        unknown = set(loaded.unexpected_keys)  # type: ignore[attr-defined]
    except (ValueError, RuntimeError) as error:
        # peft lists every tensor of another shape; the first tells enough.
        reason = " ".join(" ".join(str(error).split("\n")[:2]).split())
        raise MismatchError(f"{misfit}: {reason}") from error
    for what, names in (("has no weights for", missing), ("has weights for unknown", unknown)):
        if names:
            raise MismatchError(f"{misfit}: it {what} {len(names)} modules (first: {min(names)})")
    return adapted.eval()
