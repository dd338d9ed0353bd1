"""Bytes of live tensor storages: now, and the most there were while some code ran."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` follows every storage; `live.peak` is the most at one time.

    Storages that exist before count from the start; each counts once, however many tensors are
    views of it, until the last of them is gone. `at_peak` is called whenever there is a new peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.largest: list[int] = []  # at the peak
        self._known: dict[int, tuple[weakref.ref[object], int]] = {}

    def __enter__(self) -> LiveBytes:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects warn when they are looked at
            self._add(x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        super().__enter__()
        return self

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._add(x for x in tree_iter(result) if isinstance(x, torch.Tensor))
        return result

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or not storage.nbytes():
                continue
            size = storage.nbytes()
            self._known[key] = (weakref.ref(storage, lambda _, key=key: self._drop(key)), size)
            self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.largest = sorted((size for _, size in self._known.values()), reverse=True)[:40]

    def _drop(self, key: int) -> None:
        _, size = self._known.pop(key)
        self.now -= size


class SavedBytes:
    """Bytes that autograd keeps of what runs inside `with SavedBytes(parameters) as saved:`.

    Parameters do not count; ZeRO-3 gives them new storages while the code runs.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.bytes = 0
        self._parameters = list(parameters)
        self._kept: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._hooks.__exit__(*problem)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        weights = {p.data.untyped_storage().data_ptr() for p in self._parameters}
        if pointer not in self._kept and pointer not in weights:
            self._kept.add(pointer)
            self.bytes += storage.nbytes()
        return tensor
