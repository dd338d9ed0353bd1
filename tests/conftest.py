"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_report_header() -> str:
    """Says in which network the tests run: tests/loopback.py."""
    mode = os.environ.get("POCL_TEST_NETWORK", "host")
    return f"network: {'loopback only' if mode == 'loopback' else 'HOST (not isolated)'}"


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Returns (teacher folder, student folder, 24 training rows)."""
    from tests.tiny import write_llama, write_rows

    folder = tmp_path_factory.mktemp("tiny")
    teacher = write_llama(folder / "teacher", hidden=32, layers=2, seed=1, num_phantom=8)
    student = write_llama(folder / "student", hidden=16, layers=2, seed=2)
    return teacher, student, write_rows(folder / "train.jsonl", 24)


@pytest.fixture(scope="module")
def gloo_rank() -> Iterator[object]:
    """Returns this process as the only rank of a real gloo group."""
    import torch.distributed as dist

    from pocl_dist.distributed.process_group import join_process_group

    before = dict(os.environ)
    yield join_process_group(30)
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
