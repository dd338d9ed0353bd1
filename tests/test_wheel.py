"""The wheel alone, in an empty folder, has all that the quickstart needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("pocl_dist", "configs", "launch", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an unpacked wheel, built from a copy: pip builds inside the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = REPOSITORY / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "-q",
    ]
    line = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), "./source"]
    subprocess.run(line, cwd=folder, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(unpacked: Path, folder: Path, *words: str) -> str:
    """Returns what `python -m pocl_dist` of the wheel prints in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    line = [sys.executable, *words]
    pipe = subprocess.PIPE
    done = subprocess.run(
        line, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_configs_launch_files_rows_and_models(unpacked: Path) -> None:
    package = unpacked / "pocl_dist"
    for name in ("configs", "launch"):
        shipped = {path.relative_to(package / name) for path in (package / name).rglob("*")}
        here = {
            path.relative_to(REPOSITORY / name)
            for path in (REPOSITORY / name).rglob("*")
            if path.is_file()
        }
        assert here <= shipped
    for model in ("teacher", "student"):
        files = {path.name for path in (package / "bundled" / model).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    for name in ("train", "dev", "test"):
        mine, theirs = package / "bundled" / f"{name}.jsonl", f"pocl_dist/bundled/{name}.jsonl"
        assert mine.read_bytes() == (REPOSITORY / theirs).read_bytes()
    templates = Path("pipeline") / "report_page" / "templates"
    shipped = {path.name for path in (package / templates).iterdir()}
    assert shipped == {path.name for path in (REPOSITORY / "pocl_dist" / templates).iterdir()}
    assert (package / "py.typed").exists()
    assert not (unpacked / "tests").exists()


def test_every_module_of_the_checkout_is_in_the_wheel(unpacked: Path) -> None:
    def modules(root: Path) -> set[str]:
        return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}

    assert modules(REPOSITORY / "pocl_dist") <= modules(unpacked / "pocl_dist")


def test_it_works_from_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    where = run(unpacked, tmp_path, "-c", "import pocl_dist; print(pocl_dist.__file__)")
    assert Path(where.strip()).is_relative_to(unpacked)
    assert "64  config" in run(unpacked, tmp_path, "-m", "pocl_dist", "exit-codes")
    words = ["configs/tiny_cpu.yaml", f"run_dir={tmp_path}/run", "curriculum.num_stages=1"]
    assert "visits per row" in run(unpacked, tmp_path, "-m", "pocl_dist", "plan", *words)
    assert (tmp_path / "run" / "plan.json").exists()
    code = (
        "from pocl_dist.pipeline.launch_local import launch_file\nprint(launch_file('local.sh'))\n"
        "from pocl_dist.models.sources import find_model\n"
        "print(find_model('package:pocl_dist/bundled/student', 'k').folder)"
    )
    for path in run(unpacked, tmp_path, "-c", code).split():
        assert Path(path).is_relative_to(unpacked) and Path(path).exists()
