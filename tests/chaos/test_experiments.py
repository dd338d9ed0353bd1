"""Every experiment of the chaos suite as a slow test; `make chaos` also writes their table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.experiments import EXPERIMENTS
from tests.chaos.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Returns one lab for all: the undisturbed runs are made once."""
    scale, seed = os.environ.get("CHAOS_SCALE", "1"), os.environ.get("CHAOS_SEED", "42")
    return Lab(Path(tmp_path_factory.mktemp("chaos")), int(seed), float(scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_lost(lab: Lab, name: str) -> None:
    result = EXPERIMENTS[name](lab)
    assert result.is_good, "\n".join(result.failures) or f"{name}: nothing was done"
