"""Which rows a config names, under which key, and whether they are enough."""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.errors import DataError


@dataclass(frozen=True)
class NamedSource:
    """A source of rows and the config key that names it."""

    key: str
    source: str
    limit: int | None


def named_sources(config: Config) -> list[NamedSource]:
    """Returns the sources of a config: train, dev if there is one, then the test sets."""
    data = config.data
    found = [NamedSource("data.train", data.train, data.limit)]
    if data.dev is not None:
        found.append(NamedSource("data.dev", data.dev, data.dev_limit))
    for index, source in enumerate(data.eval):
        found.append(NamedSource(f"data.eval.{index}", source, data.eval_limit))
    return found


def check_enough(config: Config, rows: Rows) -> Rows:
    """Returns the training rows; raises DataError (65) when there are fewer than stages."""
    if len(rows.examples) < config.curriculum.num_stages:
        raise DataError(
            f"{rows.source}: {len(rows.examples)} rows cannot fill curriculum.num_stages "
            f"{config.curriculum.num_stages} stages"
        )
    return rows
