"""Ranks of hosts with other packages or another config are refused, by name."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from pocl_dist.config import Config, load_config
from pocl_dist.errors import MismatchError
from pocl_dist.pipeline.agreement import describe_strays, setup_of
from pocl_dist.versions import check_same_versions, versions
from tests.ranks import run_ranks, run_ranks_with_errors


def _agree(seeds: list[int]) -> None:
    import os

    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.pipeline.agreement import agree_on_setup

    index = int(os.environ["RANK"])
    agree_on_setup(load_config(["tiny_cpu.yaml"], [f"seed={seeds[index]}"]), join_process_group(60))


def test_ranks_of_one_config_agree_and_another_config_is_refused_on_all_ranks() -> None:
    run_ranks(_agree, 2, [7, 7])
    for _, error in run_ranks_with_errors(_agree, 2, [7, 8]):
        assert error is not None and error[0] == "MismatchError"
        assert "seed is 8, not 7" in error[1] and "(rank 1)" in error[1]


def test_an_actor_on_a_host_with_other_packages_is_refused_by_name() -> None:
    check_same_versions(versions())
    told = rf"host {re.escape(socket.gethostname())}: torch is .*, not 2\.9\.0"
    with pytest.raises(MismatchError, match=told):
        check_same_versions({**versions(), "torch": "2.9.0"})


def _told(host: str, **changes: object) -> dict[str, Any]:
    config: Config = load_config(["tiny_cpu.yaml"])
    return {"host": host, "setup": {**setup_of(config), **changes}}


def test_a_host_with_other_packages_is_named_once_with_its_ranks() -> None:
    rows = [_told("h1"), _told("h1"), _told("h2", torch="2.9.0"), _told("h2", torch="2.9.0")]
    text = describe_strays(rows)
    assert text.splitlines()[1:] == [
        f"host h2: torch is '2.9.0', not {rows[0]['setup']['torch']!r} (rank 2, 3)"
    ]
    assert "h1" in text.splitlines()[0]


def test_how_ranks_are_started_may_differ_and_everything_else_may_not(tmp_path: Path) -> None:
    config = load_config(["tiny_cpu.yaml"])
    launched = load_config(["tiny_cpu.yaml"], ["launch.ranks_with=torchrun"])
    assert setup_of(config) == setup_of(launched)
    other = load_config(["tiny_cpu.yaml"], ["engine.micro_batch_size=4"])
    assert setup_of(config) != setup_of(other)
