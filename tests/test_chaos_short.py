"""A short form of the chaos suite (tests/chaos): the same experiments with few faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import coordinator_model, damage, kill_training, result, write_order
from tests.chaos.lab import Lab
from tests.chaos.result import Result


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Returns a lab whose undisturbed training is made once."""
    return Lab(Path(tmp_path_factory.mktemp("chaos")))


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(lab: Lab) -> None:
    found = kill_training.run(lab, num_kills=2)
    assert found.is_good, found.failures
    assert (found.num_identical, found.num_compared) == (1, 1) and found.num_faults >= 2


def test_no_damage_to_a_checkpoint_goes_unnoticed(lab: Lab) -> None:
    found = damage.run(lab, num_flips=30)
    assert found.is_good, found.failures
    assert found.num_faults > 40


def test_a_power_cut_could_not_undo_what_was_committed(lab: Lab) -> None:
    found = write_order.run(lab)
    assert found.is_good, found.failures


def test_the_coordinator_follows_its_course_through_stops_and_crashes(lab: Lab) -> None:
    found = coordinator_model.run(lab, num_sequences=25)
    assert found.is_good, found.failures


def test_a_failed_experiment_is_said_so_in_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{result.BEGIN}\nold\n{result.END}\nafter\n")
    good, bad = Result("a fault", 1), Result("another", 1)
    for found in (good, bad):
        found.count()
        found.compare([])
    bad.count("it was lost")
    bad.compare(["export/model.safetensors"], "run-1")
    result.write_table(result.table({"good": good, "bad": bad}, "make chaos"), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `good` | a fault | 1 | 1 | 1 of 1 |  | 0 | ok |" in text
    assert "| `bad` | another | 2 | 1 | 1 of 2 |  | 0 | **FAILED** (2) |" in text
    assert "run-1: differs in export/model.safetensors" in text
    assert not bad.is_good and not Result("nothing done", 1).is_good
