"""Failpoints: off unless asked for, at the asked pass and rank, once if asked."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pocl_dist import failpoints
from pocl_dist.failpoints import ONCE_VARIABLE, VARIABLE, failpoint


@pytest.fixture(autouse=True)
def _nothing_passed() -> None:
    failpoints._num_passed.clear()


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    failpoint("here")
    assert not failpoints._num_passed


def test_the_named_place_fails_at_the_named_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "there=kill,here=enospc@2")
    failpoint("here")
    failpoint("elsewhere")
    with pytest.raises(OSError) as caught:
        failpoint("here")
    assert caught.value.errno == errno.ENOSPC
    failpoint("here")


def test_another_rank_gets_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "here=enospc@1%1")
    monkeypatch.setenv("RANK", "0")
    failpoint("here")
    failpoints._num_passed.clear()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OSError):
        failpoint("here")


def test_a_second_process_gets_past_where_a_folder_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "here=enospc")
    monkeypatch.setenv(ONCE_VARIABLE, str(tmp_path))
    with pytest.raises(OSError):
        failpoint("here")
    failpoints._num_passed.clear()  # as in a new process
    failpoint("here")
