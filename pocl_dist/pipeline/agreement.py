"""All ranks run the same code, packages and config, or none does: a stray host is named."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Mapping, Sequence

from pocl_dist.config import Config, flatten
from pocl_dist.distributed.collectives import gather_texts, on_any_rank
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import MismatchError
from pocl_dist.files import JSONValue, digest_of
from pocl_dist.guards import shown
from pocl_dist.versions import versions

MOST_SHOWN = 4  # differences of a host; who has another environment has many


def agree_on_setup(config: Config, rank: Rank) -> None:
    """Raises MismatchError (78), on all ranks, when one has another setup than rank 0. Collective.

    Other package versions or another config would train on, to another result. One digest is
    exchanged; only when it differs, what it is of, so that host and difference can be named.
    """
    mine = setup_of(config)
    digests = gather_texts(digest_of(mine), rank)
    if not on_any_rank(len(set(digests)) > 1, rank):
        return
    told = json.dumps({"host": socket.gethostname(), "setup": mine})
    raise MismatchError(describe_strays([json.loads(text) for text in gather_texts(told, rank)]))


def setup_of(config: Config) -> dict[str, JSONValue]:
    """Returns what must be the same on all ranks, by name. How they were started need not be."""
    keys = flatten(config.model_dump(mode="json", exclude={"launch"}))
    return {"python": platform.python_version(), **versions(), **keys}


def describe_strays(told: Sequence[Mapping[str, JSONValue]]) -> str:
    """Returns a line per host that differs from rank 0's; `told` is in the order of the ranks."""
    first = told[0]["setup"]
    assert isinstance(first, dict)
    lines: dict[str, list[int]] = {}
    for index, row in enumerate(told):
        setup = row["setup"]
        assert isinstance(setup, dict)
        names = [name for name in {**first, **setup} if setup.get(name) != first.get(name)]
        if names:
            differences = ", ".join(
                f"{name} is {shown(setup.get(name))}, not {shown(first.get(name))}"
                for name in names[:MOST_SHOWN]
            )
            more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
            lines.setdefault(f"host {row['host']}: {differences}{more}", []).append(index)
    strays = [f"{line} (rank {', '.join(map(str, ranks))})" for line, ranks in lines.items()]
    return (
        f"not all hosts have what rank 0 on {told[0]['host']} has; nothing was trained:\n"
        + "\n".join(strays)
    )
