"""A model folder of somebody else: what in it could run code, or leave the folder, is refused (77).

Loads no torch: all of this is known before a model is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pocl_dist.errors import MissingInputError, RefusedError
from pocl_dist.files import JSONValue
from pocl_dist.guards import LONGEST_NAME, inside, shown

# How torch's zip files and pickles of protocol 2 to 5 begin.
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
# Beyond it the safetensors library refuses a header itself.
LONGEST_HEADER_BYTES = 100_000_000


def _link_targets(folder: Path) -> list[Path]:
    """Returns the folders in which the files of a model folder may really lie.

    In the hub's cache `models--X/snapshots/COMMIT/*` are links into `models--X/blobs`.
    """
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots"
    return [real, real.parent.parent / "blobs"] if is_snapshot else [real]


def check_links(folder: Path, key: str) -> None:
    """Raises RefusedError when a file of the folder is a link to somewhere else.

    An export copies tokenizer files: a link to a private file would carry it out.
    """
    allowed = _link_targets(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in allowed):
            name = shown(str(path.relative_to(folder)))
            raise RefusedError(
                f"{key}: {name} in {folder} is a link that leaves the folder; put the file there"
            )


def check_is_no_pickle(file: Path, key: str) -> None:
    """Raises RefusedError for pickled weights that bear the name of safetensors.

    They would not run, the safetensors library cannot read them; but who made them meant harm, or
    needs another word than "header too large".
    """
    with file.open("rb") as handle:
        start = handle.read(9)
    length = int.from_bytes(start[:8], "little")
    is_safetensors = start[8:] == b"{" and length <= LONGEST_HEADER_BYTES
    if not is_safetensors and start.startswith(_PICKLE_STARTS):
        raise RefusedError(
            f"{key}: {file} is no safetensors file but pickled weights, which can run code when "
            "loaded; convert them (transformers: save_pretrained)"
        )


def _check_code(
    folder: Path, key: str, settings: Mapping[str, Mapping[str, JSONValue]], trust_remote_code: bool
) -> None:
    if trust_remote_code:
        return
    hint = "set trust_remote_code: true beside the path if you trust its author"
    for name, values in settings.items():
        parts = [values, *(value for value in values.values() if isinstance(value, dict))]
        for part in parts:  # a config of text and images holds configs
            if "auto_map" in part:
                raise RefusedError(
                    f"{key}: the model in {folder} brings Python code of its own ({name}); {hint}"
                )
            for entry, value in part.items():  # transformers fetches a kernel from the hub, as code
                is_kernel = entry.endswith(("attn_implementation", "experts_implementation"))
                if is_kernel and "/" in str(value):
                    raise RefusedError(
                        f"{key}: {name} in {folder} asks for code from the hub: "
                        f"{entry} {shown(value)}; {hint}"
                    )


def check_settings(
    folder: Path, key: str, settings: Mapping[str, Mapping[str, JSONValue]], trust_remote_code: bool
) -> None:
    """Raises RefusedError when settings ({file: content}) name code or files outside the folder."""
    _check_code(folder, key, settings, trust_remote_code)
    for name, values in settings.items():
        for entry, value in values.items():
            # Many published tokenizers keep the path that a file once had at its author's.
            if entry.endswith("_file") and isinstance(value, str) and _exists(folder / value):
                _check_name(folder, value, f"{key}: {folder / name}")
        weight_map = values.get("weight_map")
        if weight_map is None:
            continue
        if not isinstance(weight_map, dict):
            raise MissingInputError(f"{key}: {folder / name}: weight_map is no list of files")
        for shard in {str(shard) for shard in weight_map.values()}:
            if not shard.endswith(".safetensors"):
                raise RefusedError(
                    f"{key}: {folder / name} names {shown(shard)}, which is no safetensors file"
                )
            _check_name(folder, shard, f"{key}: {folder / name}")


def _check_name(folder: Path, name: str, what: str) -> None:
    """Raises RefusedError for a name that leaves the folder other than by the hub's own links."""
    is_plain = name == Path(name).name and len(name) <= LONGEST_NAME and name.isprintable()
    if not (is_plain and (folder / name).is_symlink()):  # `check_links` has let the link through
        inside(folder, name, what)


def _exists(path: Path) -> bool:
    """Returns whether a path, perhaps one that no file system takes, is a file."""
    try:
        return path.is_file()
    except OSError:
        return False
