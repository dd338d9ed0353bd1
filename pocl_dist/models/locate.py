"""Where a model lies, without downloading or converting its weights; for checks before a run.

`sources.find_model` fetches and converts what it finds by the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocl_dist.models.sources import check_model_folder, hub_errors, local_model

CONNECT_SECONDS = 5
# What tells of a model of the hub all but its weights: a few megabytes.
_SETTINGS = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")


@dataclass(frozen=True)
class Located:
    """Where a model's settings and tokenizer can be read; are its weights there too?"""

    path: Path  # a folder, or a GGUF file
    origin: str
    has_weights: bool


def locate_model(
    path: str, key: str, revision: str | None, trust_remote_code: bool, scratch: Path
) -> Located:
    """Returns where the model named by the config key `key` lies.

    A hub id is looked for in the hub's cache; if it is not there, its settings are downloaded into
    `scratch`: in the cache they would look like the whole model. Raises as `find_model`.
    """
    local = local_model(path, key)
    if local is not None:
        if local.is_dir():
            check_model_folder(local, key, trust_remote_code)
        return Located(local, path, has_weights=True)
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    with hub_errors(path, revision, key):
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(cached, str):
            folder = Path(cached).parent
            check_model_folder(folder, key, trust_remote_code)
            return Located(folder, path, has_weights=True)
        snapshot_download(
            path,
            revision=revision,
            allow_patterns=list(_SETTINGS),
            local_dir=scratch,
            etag_timeout=CONNECT_SECONDS,
        )
    return Located(scratch, path, has_weights=False)
