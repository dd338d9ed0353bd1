"""Hostile configs: refused with 64 in one or a few clean lines, fast, without running anything."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings

from pocl_dist.config import load_config
from pocl_dist.config.load import MAX_CONFIG_BYTES
from pocl_dist.errors import ConfigError
from tests.hostile import hostile_configs, hostile_files
from tests.test_hostile_rows import RELAXED

BASE = b"run_dir: x\nmodels: {teacher: null, student: {path: s}}\ndata: {train: t.jsonl}\n"
LAUGHS = "\n".join(
    [f"a0: &a0 [{','.join(['lol'] * 9)}]"]
    + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
REFUSED: dict[str, bytes] = {
    "billion laughs": LAUGHS.encode(),
    "python object": b"seed: !!python/object/apply:os.system ['touch MARKER']",
    "python name": b"seed: !!python/name:os.system",
    "own tag": b"seed: !secret 3",
    "key twice": b"seed: 1\nseed: 2",
    "key twice, deep": b"data: {train: a, train: b}",
    "alias": b"a: &a 1\nb: *a",
    "two documents": b"seed: 1\n---\nseed: 2",
    "NUL": b"seed: 1\0",
    "escape character": b"seed: \x1b[2J",
    "not UTF-8": b"seed: \xff",
    "UTF-16": "seed: 1".encode("utf-16"),
    "half a surrogate pair": b'run_dir: "\\ud800"',
    "deep list": b"seed: " + b"[" * 100_000,
    "deep mapping": b"seed: " + b"{a: " * 20_000,
    "deep blocks": b"\n".join(b" " * n + b"a:" for n in range(1200)),
    "huge number": b"seed: " + b"9" * 100_000,
    "list as key": b"? [a, b]\n: c",
    "too large": b"#" * (MAX_CONFIG_BYTES + 1),
    "a thousand unknown keys": b"\n".join(b"key%d: 1" % n for n in range(1000)),
    "empty": b"",
    "a list": b"- a\n- b",
    "pickle": b"\x80\x04\x95.",
}


def refusal(path: Path, content: bytes) -> str:
    """Returns the message that a hostile config is refused with."""
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert caught.value.exit_code == 64
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_config_is_refused_within_a_second_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    started = time.process_time()  # other work on the machine does not count
    message = refusal(path, REFUSED[name])
    assert time.process_time() - started < 1
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert len(message.splitlines()) <= 21 and len(message) < 5000
    assert all(line.isprintable() for line in message.splitlines())
    is_about_a_key = name in ("half a surrogate pair", "a thousand unknown keys")
    assert is_about_a_key or message.startswith(f"{path}: ")


def check_config_file(path: Path, content: bytes) -> None:
    """Loads a config with hostile bytes behind good ones: it loads, or is refused cleanly."""
    path.write_bytes(BASE + content)
    try:
        load_config([path])
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines and all(line.isprintable() and len(line) < 600 for line in lines)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "config.yaml"


@settings(max_examples=80, **RELAXED)  # type: ignore[arg-type]
@given(content=hostile_configs)
def test_hostile_configs_load_or_are_refused(file: Path, content: bytes) -> None:
    check_config_file(file, content)


@pytest.mark.slow
@settings(max_examples=2000, **RELAXED)  # type: ignore[arg-type]
@given(content=hostile_configs)
def test_two_thousand_hostile_configs(file: Path, content: bytes) -> None:
    check_config_file(file, content)


def test_files_without_hypothesis_are_refused_likewise(file: Path) -> None:
    for content in hostile_files(seed=11, count=60):
        check_config_file(file, content)


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@host/v1", "https://hunter2@host/v1", "ftp://a:hunter2@h"]
)
def test_a_url_with_a_password_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    text = f"measure: {{engine: server, server_model: m, server_url: '{url}'}}"
    message = refusal(tmp_path / "config.yaml", BASE + text.encode())
    assert message.startswith("measure.server_url: no user or password")
    assert "hunter2" not in message
