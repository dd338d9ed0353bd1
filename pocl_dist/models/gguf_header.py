"""Settings, tokenizer and tensors of a GGUF file from its header. No torch, no weights.

The format: magic, version, two counts; then keys with typed values; then a name, shape, type and
offset per tensor. Little endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pocl_dist.errors import MissingInputError
from pocl_dist.models.weight_files import TensorHeader

MAGIC = b"GGUF"
MAX_COUNT = 10_000_000  # of keys, tensors or items of a list: the largest vocabulary is far below
MAX_TEXT_BYTES = 16 << 20
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_TEXT, _LIST = 8, 9

Value = int | float | bool | str | list["Value"]


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its weights begin."""

    values: dict[str, Value]
    tensors: list[TensorHeader]

    def setting(self, name: str) -> Value | None:
        """Returns a setting of the file's architecture, e.g. `block_count`."""
        return self.values.get(f"{self.values.get('general.architecture')}.{name}")


def read_gguf_header(file: Path, key: str) -> GGUFHeader:
    """Returns the header of a GGUF file; MissingInputError (66) with the config key if damaged."""
    try:
        with file.open("rb") as handle:
            return _read(handle)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise MissingInputError(f"{key}: {file} is no usable GGUF file: {error}") from error


def _read(handle: BinaryIO) -> GGUFHeader:
    if handle.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = _number(handle, "<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format is not known")
    num_tensors, num_values = _count(handle), _count(handle)
    values: dict[str, Value] = {}
    for _ in range(num_values):
        name = _text(handle)
        values[name] = _value(handle, int(_number(handle, "<I")))
    tensors = []
    for _ in range(num_tensors):
        name, num_sizes = _text(handle), int(_number(handle, "<I"))
        if num_sizes > 8:
            raise ValueError(f"a tensor with {num_sizes} dimensions")
        sizes = [int(_number(handle, "<Q")) for _ in range(num_sizes)]
        kind = int(_number(handle, "<I"))
        _number(handle, "<Q")  # where its weights begin
        tensors.append(TensorHeader(name, f"ggml type {kind}", tuple(reversed(sizes))))
    return GGUFHeader(values, tensors)


def _number(handle: BinaryIO, form: str) -> int | float | bool:
    number: int | float | bool = struct.unpack(form, handle.read(struct.calcsize(form)))[0]
    return number


def _count(handle: BinaryIO) -> int:
    count = int(_number(handle, "<Q"))
    if count > MAX_COUNT:
        raise ValueError(f"a count of {count}")
    return count


def _text(handle: BinaryIO) -> str:
    length = int(_number(handle, "<Q"))
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"a text of {length} bytes")
    data = handle.read(length)
    if len(data) < length:
        raise ValueError("it ends in its header")
    return data.decode()


def _value(handle: BinaryIO, kind: int, depth: int = 0) -> Value:
    if kind in _NUMBERS:
        return _number(handle, _NUMBERS[kind])
    if kind == _TEXT:
        return _text(handle)
    if kind != _LIST or depth > 4:
        raise ValueError(f"a value of type {kind}")
    inner, count = int(_number(handle, "<I")), _count(handle)
    return [_value(handle, inner, depth + 1) for _ in range(count)]
