"""Hostile data files and configs: refused with code and place, or read right (T16).

hypothesis makes them; an independent, strict reader in this file says which rows must be accepted.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from pocl_dist.config import load_config
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import ConfigError, DataError, MissingInputError, PoclError
from tests.chaos.lab import Lab
from tests.chaos.result import Result

NUM_EXAMPLES = 2000

# ------------------------------------------------------------------------------------------- rows

_texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\0", "\ud800", "a\0b", "\u2028", "../../etc/passwd", "{}", "NaN"]),
)
_scalars = st.one_of(
    _texts, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400),
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(st.text(max_size=4), below, max_size=3)
    ),
    max_leaves=6,
)
_fields = st.sampled_from(
    ["instruction", "input", "output", "prompt", "response", "messages", "id", "other"]
)
_rows = st.one_of(
    st.dictionaries(_fields, _values, max_size=6),
    st.fixed_dictionaries({"instruction": _texts, "output": _texts}),
    st.fixed_dictionaries({"prompt": _texts, "response": _texts, "id": _scalars}),
)
_lines = st.one_of(
    _rows.map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass")),
    _rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")),
    st.just(b'{"instruction":"a","instruction":"b","output":"c"}'),
    st.just(b"[" * 3000 + b"]" * 3000),
    st.just(b'{"instruction":' + b"9" * 5000 + b"}"),
    st.just(b"\xef\xbb\xbf"),
    st.just(b'{"instruction":"a","output":"b"}'),
    st.just(b'{"instruction":"a"'),
)


def _is_text(value: object) -> bool:
    return (
        isinstance(value, str)
        and value.strip() != ""
        and not any(char == "\0" or 0xD800 <= ord(char) <= 0xDFFF for char in value)
    )


def _is_answer(value: object) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_text, value))
    )


def _is_good_row(row: dict) -> bool:
    """Returns whether a row of the three forms must be accepted; written from the README alone."""
    given_id = row.get("id")
    if given_id is not None:
        is_number = isinstance(given_id, int) and not isinstance(given_id, bool)
        if not (_is_text(given_id) or (is_number and abs(given_id) < 10**4000)):
            return False
    if "messages" in row:
        turns = row["messages"]
        return (
            isinstance(turns, list)
            and len(turns) >= 2
            and all(isinstance(t, dict) and _is_text(t.get("role")) for t in turns)
            and all(_is_text(t.get("content")) for t in turns)
            and [t["role"] for t in turns[-2:]] == ["user", "assistant"]
        )
    if "instruction" in row:
        context = row.get("input", "")
        is_context = isinstance(context, str) and (context.strip() == "" or _is_text(context))
        is_context = is_context and "\0" not in context
        return is_context and _is_text(row["instruction"]) and _is_answer(row.get("output"))
    return _is_text(row.get("prompt")) and _is_answer(row.get("response"))


def _strict_rows(data: bytes) -> list[tuple[int, dict | None]]:
    """Returns (line number, row or None when it is bad) of all lines that are not blank."""

    def unique(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    found: list[tuple[int, dict | None]] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip(b"\r").decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError):
            row = None
        is_good = isinstance(row, dict) and _is_good_row(row)
        found.append((number, row if is_good else None))
    return found


def check_data_file(path: Path, data: bytes) -> str:
    """Returns what is wrong in how a data file was treated; empty if nothing."""
    path.write_bytes(data)
    rows = _strict_rows(data)
    bad = [number for number, row in rows if row is None]
    try:
        read = read_rows(str(path), "data.train", on_bad_row="quarantine", max_bad_rows=10**6)
        found = {row.row for row in read.bad_rows}
        if not set(bad) <= found:
            return f"bad lines {sorted(set(bad) - found)} were accepted"
        twice = [str(row) for row in read.bad_rows if row.row not in bad]
        if any("is that of row" not in text for text in twice):
            return f"good rows were refused: {twice}"
    except DataError as error:
        if str(path) not in str(error):
            return f"the message does not name the file: {error}"
        if any(row is not None for _, row in rows):
            return f"good rows, but: {error}"
    return _check_refusal(lambda: read_rows(str(path), "data.train"), path, bool(bad) or not rows)


def _check_refusal(read: Callable[[], object], path: Path, must_refuse: bool) -> str:
    try:
        read()
    except (DataError, ConfigError, MissingInputError) as error:
        text = str(error)
        if "\x1b" in text or "\0" in text:
            return f"control characters in the message: {text!r}"
        return "" if str(path) in text else f"the message does not name the file: {text!r}"
    return "a bad file was accepted" if must_refuse else ""


def check_parquet_file(path: Path, data: bytes) -> str:
    """Returns what is wrong in how something with the ending of Parquet was treated."""
    path.write_bytes(data)
    return _check_refusal(lambda: read_rows(str(path), "data.train"), path, True)


def parquet_bytes(path: Path) -> bytes:
    """Returns a good Parquet file of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


# ---------------------------------------------------------------------------------------- configs

_keys = st.sampled_from(
    [
        "run_dir", "seed", "models", "data", "curriculum", "loss", "optimizer", "engine", "ray",
        "models.teacher", "models.student", "models.student.path", "data.train", "data.template",
        "curriculum.temperature", "curriculum.num_stages", "optimizer.betas", "loss.kwargs",
        "engine.world_size", "engine.zero_options", "checkpoint.every", "run.max_restarts", "zzz",
    ]
)  # fmt: skip
_yaml_values = st.one_of(
    _values,
    st.sampled_from(
        [
            "!!python/object/apply:os.system [id]", "&a [*a]", "*nothing", "{<<: {a: 1}}", "1e999",
            ".nan", "-0", "0x10", "1_000", "{a: 1, a: 2}", "? [a]\n: b", "!!binary aGk=", "[", "}",
            "|\n  text", "2001-01-01", "'\\x1b[31m'", '"\\e[31m"', "9" * 5000, "[" * 2000,
        ]
    ),
)  # fmt: skip
_overrides = st.tuples(_keys, _yaml_values).map(lambda pair: f"{pair[0]}={_plain(pair[1])}")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _yaml_files(good: str) -> st.SearchStrategy[bytes]:
    lines = good.splitlines()
    swapped = st.tuples(st.integers(0, len(lines) - 1), _yaml_values).map(
        lambda pair: "\n".join(
            [
                *lines[: pair[0]],
                f"{lines[pair[0]].partition(':')[0]}: {_plain(pair[1])}",
                *lines[pair[0] + 1 :],
            ]
        ).encode("utf-8", "surrogatepass")
    )
    return st.one_of(
        swapped,
        st.binary(max_size=80),
        st.integers(0, len(good)).map(lambda size: good[:size].encode()),
    )


def check_config(path: Path, data: bytes, overrides: list[str]) -> str:
    """Returns what is wrong in how a config was treated: anything but a Config or a refusal."""
    path.write_bytes(data)
    try:
        load_config([path], overrides)
    except (ConfigError, MissingInputError) as error:
        text = str(error)
        if any(ord(char) < 32 and char != "\n" for char in text):
            return f"control characters in the message: {text[:200]!r}"
        return "" if len(text) < 20_000 else f"a message of {len(text)} characters"
    except PoclError as error:
        return f"exit code {error.exit_code}: {error}"
    return ""


# ------------------------------------------------------------------------------------------- runs


def _drive(
    result: Result, num: int, number: int, strategy: st.SearchStrategy, check: Callable[..., str]
) -> None:
    """Lets hypothesis try `num` inputs; every problem and every exception is a failure."""

    @seed(number)
    @settings(
        max_examples=num, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def attempt(value: object) -> None:
        try:
            problem = check(value)
        except Exception as error:  # what this looks for
            problem = f"uncaught {type(error).__name__}: {error}"[:300]
        result.num_faults += 1
        result.num_survived += not problem
        assert not problem, f"{problem} for {value!r}"[:600]

    try:
        attempt()
    except AssertionError as error:
        result.failures.append(f"{check.__name__}: {error}")


def run(lab: Lab, num_examples: int = NUM_EXAMPLES) -> Result:
    """Half data files, a tenth damaged Parquet, the rest configs and overrides."""
    result = lab.result("hostile data files and configs, made by hypothesis")
    folder, num, number = lab.place("hostile"), lab.count(num_examples), lab.seed
    files = st.tuples(st.lists(_lines, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\n\n"]))

    def check_jsonl(value: tuple[list[bytes], bytes]) -> str:
        lines, newline = value
        return check_data_file(folder / "rows.jsonl", newline.join(lines))

    _drive(result, num // 2, number, files, check_jsonl)
    good, generator = parquet_bytes(folder / "good.parquet"), random.Random(number)

    def check_parquet(size: int) -> str:
        data = bytearray(good[:size])
        data[-4:] = struct.pack("<I", generator.getrandbits(32)) if size % 2 else data[-4:]
        return check_parquet_file(folder / "rows.parquet", bytes(data))

    _drive(result, num // 10, number, st.integers(0, len(good) - 1), check_parquet)
    config = lab.training_config(lab.place("hostile-config")).read_text()

    def check_yaml(value: tuple[bytes, list[str]]) -> str:
        return check_config(folder / "config.yaml", *value)

    configs = st.tuples(_yaml_files(config), st.lists(_overrides, max_size=2))
    _drive(result, num - num // 2 - num // 10, number, configs, check_yaml)
    return result
