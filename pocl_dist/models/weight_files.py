"""Names, shapes and sizes of a model's tensors, from the headers of its files; loads no torch.

A safetensors file begins with the length of its header (8 bytes) and the header, JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pocl_dist.errors import MissingInputError
from pocl_dist.files import read_json
from pocl_dist.models.folder_checks import LONGEST_HEADER_BYTES

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a file's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Returns the number of its elements."""
        return math.prod(self.shape)


def read_safetensors_header(file: Path, key: str) -> list[TensorHeader]:
    """Returns the tensors of a safetensors file.

    Raises MissingInputError (66), naming the config key, when the header is damaged or the file is
    shorter or longer than it says: a download that broke off.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
            raise MissingInputError(
                f"{key}: no usable model: {file} has no safetensors header ({size} bytes)"
            )
        text = handle.read(length)
    try:
        return _tensors(json.loads(text), size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MissingInputError(f"{key}: no usable model: {file}: {error}") from error


def _tensors(header: dict[str, dict[str, object]], num_data_bytes: int) -> list[TensorHeader]:
    header.pop("__metadata__", None)
    found, end = [], 0
    for name, entry in header.items():
        shape = tuple(int(size) for size in cast("list[int]", entry["shape"]))
        end = max(end, int(cast("list[int]", entry["data_offsets"])[1]))
        found.append(TensorHeader(name, str(entry["dtype"]), shape))
    if end != num_data_bytes:
        raise ValueError(
            f"its header promises {end} bytes of weights and {num_data_bytes} are there; "
            "copy or download it again"
        )
    return found


def read_folder_headers(folder: Path, key: str) -> list[TensorHeader]:
    """Returns the tensors of all safetensors files of a model folder (MissingInputError 66)."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.exists():
        try:
            shards = cast("dict[str, str]", read_json(index).get("weight_map") or {})
        except ValueError as error:
            raise MissingInputError(f"{key}: no usable model: {error}") from error
        names = sorted(set(map(str, shards.values())))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise MissingInputError(
                f"{key}: {folder} lacks {len(missing)} of {len(names)} files of weights that "
                f"{INDEX} names (first: {missing[0]})"
            )
        files = [folder / name for name in names] or files
    return [tensor for file in files for tensor in read_safetensors_header(file, key)]
