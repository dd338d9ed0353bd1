"""A digest of what is too long to be held."""

from __future__ import annotations

import hashlib

from pocl_dist.files import JSONValue, canonical_json


class ListDigest:
    """The `digest_of` a list that comes item by item and is never held as a whole."""

    def __init__(self, before: str = "") -> None:
        self._hash = hashlib.sha256(f"{before}[".encode())
        self._is_empty = True

    def add(self, item: JSONValue) -> None:
        """Takes the next item."""
        self.extend([item])

    def extend(self, items: list[JSONValue]) -> None:
        """Takes the next items: many at once are quicker than each by itself."""
        if items:
            comma = "" if self._is_empty else ","
            self._hash.update(f"{comma}{canonical_json(items)[1:-1]}".encode())
            self._is_empty = False

    def hexdigest(self, after: str = "") -> str:
        """Returns the digest of the list of what was taken.

        `before` and `after` are JSON around the list, where it is part of a larger value.
        """
        whole = self._hash.copy()
        whole.update(f"]{after}".encode())
        return whole.hexdigest()
