"""A digest of what is too long to be held."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pocl_dist.files import JSONValue, canonical_json

_ITEMS_AT_ONCE = 64


class ListDigest:
    """The `digest_of` a list that comes item by item and is never held as a whole."""

    def __init__(self, before: str = "") -> None:
        """`before`, and `after` at the end, are JSON around the list in a larger value."""
        self._hash = hashlib.sha256(f"{before}[".encode())
        self._comma = ""
        self._items: list[JSONValue] = []  # some at once are quicker than each by itself

    def add(self, item: JSONValue) -> None:
        """Takes the next item."""
        self._items.append(item)
        if len(self._items) == _ITEMS_AT_ONCE:
            self._take()

    def extend(self, items: Iterable[JSONValue]) -> None:
        """Takes the next items."""
        for item in items:
            self.add(item)

    def _take(self) -> None:
        if self._items:
            self._hash.update(f"{self._comma}{canonical_json(self._items)[1:-1]}".encode())
            self._comma = ","
            self._items.clear()

    def hexdigest(self, after: str = "") -> str:
        """Returns the digest of the list of what was taken."""
        self._take()
        whole = self._hash.copy()
        whole.update(f"]{after}".encode())
        return whole.hexdigest()
