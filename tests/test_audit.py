"""Versions with known holes: the pins, the bounds of setup.py and the check at the start agree."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from pocl_dist import guards
from pocl_dist.cli import main
from pocl_dist.errors import RefusedError
from tests.audit import ROOT, findings, read_holes, read_pins


def test_no_pinned_version_has_a_known_hole_and_every_hole_is_told_once() -> None:
    holes = read_holes()
    assert findings(read_pins(ROOT / "constraints.txt"), holes) == []
    assert len({hole.id for hole in holes}) == len(holes)
    assert all(re.fullmatch(r"CVE-20\d\d-\d{4,6}", hole.id) for hole in holes)


def test_an_old_version_is_found_by_the_command(tmp_path: Path) -> None:
    old = tmp_path / "old.txt"
    old.write_text("# pins\ntorch==2.9.1\nPyYAML==6.0\nray==2.60.0\n")
    words = [sys.executable, "-m", "tests.audit", str(old)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "audit: torch 2.9.1: CVE-2026-24747 (code execution through an untrusted checkpoint, "
        "weights_only=True included); fixed in 2.10.0"
    ]
    assert "CVE-2023-48022 is open in every version" in done.stdout


@pytest.mark.parametrize("name", guards.MINIMUM_VERSIONS)
def test_bounds_of_the_start_and_of_setup_close_all_holes_that_can_be_closed(name: str) -> None:
    fixed = [Version(h.fixed_in) for h in read_holes() if h.package == name and h.fixed_in]
    minimum = ".".join(map(str, guards.MINIMUM_VERSIONS[name]))
    assert Version(minimum) == max(fixed)
    bound = re.search(rf'"{name}>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert bound is not None and Version(bound[1]) >= max(fixed)


def test_a_version_with_a_hole_stops_a_command_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards.check_versions()  # what is installed here will do
    for found in ("2.53.1", "2.5rc1", "1.0+cpu", "unknown"):
        monkeypatch.setattr(
            guards, "version", lambda name, found=found: found if name == "ray" else "99.0"
        )
        with pytest.raises(RefusedError, match=rf"^ray {re.escape(found)} has known"):
            guards.check_versions()
    config = "run_dir=x", "models.teacher=", "models.student.path=s", "data.train=t.jsonl"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", *config])
    assert caught.value.code == 77 and list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_there_is_for_the_step_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(guards, "version", missing)
    guards.check_versions()
