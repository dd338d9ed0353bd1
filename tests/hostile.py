"""Hostile bytes: data rows and configs that a broken program, or somebody who means harm, writes.

`hostile_rows` and `hostile_configs` are hypothesis strategies; `hostile_files(seed, count)` gives
bytes without hypothesis, for the chaos suite.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

SECTIONS = ("models", "data", "engine", "curriculum", "optimizer", "measure", "loss", "seed", "ray")
FIELDS = ("id", "instruction", "input", "output", "prompt", "response", "messages", "role")
# Text that breaks parsers, terminals, logs and paths.
NASTY = (
    "",
    " ",
    "\0",
    "\x1b[2J\x1b[31mred",
    "a\nb: forged line",
    "\r\nx",
    "\u202eevil",
    "\u2028",
    "\ufeff",
    "\ud83d",
    "../../etc/passwd",
    "/etc/passwd",
    "{{7*7}}",
    "%s%n",
    "é" * 300,
    "\u0000" * 9,
    "NaN",
    "<script>",
    "'; --",
    "\x7f\x80\x9b31m",
    "=1+1",
    "${HOME}",
    "$(touch /tmp/x)",
    "!!python/object",
)
SCALARS: tuple[object, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    -0.0,
    *NASTY,
)
RAW = (
    b"",
    b"\n",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\0" * 40,
    b"\xff\xfe{\0}\0",
    b"\x80\x02cos\nsystem\n.",
    b"PK\x03\x04",
    b"PAR1",
    b"{" * 5000,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b'"\\ud800"',
    b'{"output":NaN,"instruction":Infinity}',
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"{}{}",
    b"null",
    b"-",
    b'{"id":' + b"[" * 900 + b"]" * 900 + b',"prompt":"a","response":"b"}',
    b'{"id":1e999,"prompt":"a","response":"b"}',
    b'{"id":' + b"8" * 4300 + b',"prompt":"a","response":"b"}',
    b"a: &a [x]\nb: *a\n",
    b"!!python/object/apply:os.system [id]\n",
    b"a: 1\na: 2\n",
    b"? [a]\n: b\n",
    b"%TAG ! tag:x,2000:\n---\n!a b\n",
    b"---\na: 1\n---\nb: 2\n",
    b"<<: {seed: 1}\n",
    b"\t\ta: b",
    b'a: "\\ud800"\n',
    b"seed: 0x7fffffff\n",
    b"seed: 1_0\n",
    b"seed: 2001-01-01\n",
    b"seed: 1:30\n",
)


def _dump(value: object) -> bytes:
    """Returns JSON, NaN and half surrogates included, as Python's own writer lets them through."""
    return json.dumps(value).encode()


def _value(rng: random.Random, depth: int = 0) -> object:
    if depth < 3 and rng.random() < 0.25:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.2:
        keys = rng.sample(FIELDS + SECTIONS, rng.randrange(4))
        return {key: _value(rng, depth + 1) for key in keys}
    return rng.choice(SCALARS)


def _row(rng: random.Random) -> bytes:
    row: dict[str, object] = {"instruction": "a", "output": "b"}
    for key in rng.sample(FIELDS, rng.randrange(3)):
        row[key] = _value(rng)
    return _dump(row)


def _damaged(rng: random.Random) -> bytes:
    data = bytearray(_row(rng))
    for _ in range(1 + rng.randrange(4)):
        place = rng.randrange(len(data))
        data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        data = data or bytearray(b"{")
    return bytes(data)


def _config(rng: random.Random) -> bytes:
    keys = rng.sample(SECTIONS, 1 + rng.randrange(4))
    return b"\n".join(key.encode() + b": " + _dump(_value(rng)) for key in keys)


def hostile_files(seed: int, count: int) -> Iterator[bytes]:
    """Yields `count` files, the same for the same seed; each is some lines, good ones among them.

    Any of them may be given to the readers of rows (JSONL) and of configs alike.
    """
    rng = random.Random(seed)
    makers: tuple[Callable[[random.Random], bytes], ...] = (
        _row,
        _damaged,
        _config,
        lambda rng: rng.choice(RAW),
        lambda rng: rng.randbytes(rng.randrange(60)),
        lambda _: b'{"instruction":"good","output":"row"}',
    )
    for _ in range(count):
        lines = [rng.choice(makers)(rng) for _ in range(1 + rng.randrange(5))]
        yield rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)


# --- hypothesis strategies

_texts = st.one_of(
    st.sampled_from(NASTY), st.text(st.characters(exclude_categories=()), max_size=8)
)
_values = st.recursive(
    st.one_of(st.sampled_from(SCALARS), _texts, st.integers(), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS + SECTIONS), _texts), inner, max_size=3),
    ),
    max_leaves=6,
)
_objects = st.dictionaries(st.sampled_from(FIELDS), st.one_of(st.just("text"), _values), max_size=4)


def _repeat_first_key(row: dict[str, object]) -> bytes:
    first = next(iter(row), "output")
    return _dump({first: "x"})[:-1] + b"," + (_dump(row)[1:] if row else b'"output":"x"}')


_lines = st.one_of(
    _objects.map(_dump),
    st.builds(lambda row: _dump({"instruction": "a", "output": "b", **row}), _objects),
    _objects.map(_repeat_first_key),
    _values.map(_dump),
    st.sampled_from(RAW),
    st.binary(max_size=40),
    st.builds(lambda line, cut: line[:cut], _objects.map(_dump), st.integers(0, 40)),
    st.just(b'{"instruction":"good","output":"row"}'),
)
hostile_rows = st.builds(
    lambda lines, end: end.join(lines),
    st.lists(_lines, max_size=5),
    st.sampled_from((b"\n", b"\r\n")),
)
_sections = st.builds(
    lambda key, value: key.encode() + b": " + _dump(value), st.sampled_from(SECTIONS), _values
)
hostile_configs = st.one_of(
    st.lists(_sections, max_size=4).map(b"\n".join),
    st.lists(st.one_of(_sections, st.sampled_from(RAW)), max_size=4).map(b"\n".join),
    st.binary(max_size=80),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=80).map(str.encode),
)
