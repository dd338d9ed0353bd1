"""Answers on disk, a sealed JSON file per shard: of generate, evaluate, a server. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.display.output import warn
from pocl_dist.errors import DataError
from pocl_dist.files import read_json
from pocl_dist.shard_files import count_halved, remove_damaged, sealed_shards, write_shard


@dataclass(frozen=True)
class AnswerFiles:
    """Files STEM-00017.json of {example id: answer}; the number is that of their first batch."""

    folder: Path
    stem: str = "shard"

    @property
    def _pattern(self) -> str:
        return f"{self.stem}-*.json"

    def read(self) -> dict[str, str]:
        """Returns {example id: answer} of all shards; a damaged one is removed, with a warning."""
        for damage in remove_damaged(self.folder, self._pattern):
            warn(f"{damage}; it is answered again")
        answers: dict[str, str] = {}
        for path in sealed_shards(self.folder, self._pattern):
            try:
                answers |= {name: str(text) for name, text in read_json(path).items()}
            except ValueError as error:
                raise DataError(f"{error}; remove it and run the step again") from error
        return answers

    def write(self, name: str, text_of_id: Mapping[str, str], num_halved: int = 0) -> None:
        """Writes a shard; `num_halved` of its batches did not fit into memory whole."""
        text = json.dumps(dict(text_of_id), indent=1, ensure_ascii=False) + "\n"
        write_shard(self.folder / f"{name}.json", text.encode(), num_halved)

    def count_halved(self) -> int:
        """Returns how many batches did not fit into memory whole."""
        return count_halved(self.folder, self._pattern)
