"""Thousands of hostile data files and configs: read right, or refused with their place (T16).

The files and what must be said of each are those of the tests (tests/hostile.py, an independent
parser in test_hostile_rows.py); here there are more of them, and Parquet cut short.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from pocl_dist.data.sources import read_rows
from pocl_dist.errors import DataError
from tests.chaos.lab import Lab
from tests.chaos.result import Result
from tests.hostile import hostile_configs, hostile_rows
from tests.test_hostile_configs import check_config_file
from tests.test_hostile_rows import check_file

NUM_EXAMPLES = 2000


def _parquet_bytes(path: Path) -> bytes:
    """Returns a good Parquet file of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def _check_parquet(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read_rows(str(path), "data.train")
    except DataError as error:
        assert str(path) in str(error), f"the file is not named: {error}"
    else:
        raise AssertionError("a damaged Parquet file was read")


def _drive(
    result: Result, num: int, content: st.SearchStrategy[bytes], check: Callable[[bytes], None]
) -> None:
    """Lets hypothesis try `num` contents; any exception but a promised refusal is a failure."""

    @seed(result.seed)
    @settings(
        max_examples=num, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(content)
    def attempt(value: bytes) -> None:
        result.num_faults += 1
        check(value)
        result.num_survived += 1

    try:
        attempt()
    except (Exception, ExceptionGroup) as error:  # what this looks for
        result.failures.append(f"{type(error).__name__}: {error} {error.__notes__}"[:900])


def run(lab: Lab, num_examples: int = NUM_EXAMPLES) -> Result:
    """Half data files, a tenth damaged Parquet, the rest configs."""
    result = lab.result("hostile data files and configs, made by hypothesis")
    folder, num = lab.place("hostile"), lab.count(num_examples)
    good, generator = _parquet_bytes(folder / "good.parquet"), random.Random(lab.seed)
    cuts = st.integers(0, len(good) - 1).map(
        lambda size: good[:size] + generator.randbytes(generator.randrange(9))
    )
    _drive(result, num // 2, hostile_rows, partial(check_file, folder / "rows.jsonl"))
    _drive(result, num // 10, cuts, partial(_check_parquet, folder / "rows.parquet"))
    rest = num - num // 2 - num // 10
    _drive(result, rest, hostile_configs, partial(check_config_file, folder / "config.yaml"))
    result.notes.append("uncaught exceptions: 0" if result.is_good else "see the failures")
    return result
