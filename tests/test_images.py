"""docker/: the linters, the locks, and the entry script with the variables that launchers set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from pocl_dist.config.kubernetes_sections import KubernetesConfig
from tests.audit import ROOT, findings, read_holes, read_pins

DOCKER = ROOT / "docker"
LOCKS = ["requirements.cpu.txt", "requirements.gpu.txt"]
LAUNCHER = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0.svc",
    "MASTER_PORT": "8476",
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "3",
    "JOB_COMPLETION_INDEX": "2",
    "NCCL_DEBUG": "WARN",
}


def tool(name: str) -> str:
    """Returns a linter of the extra `dev`."""
    return str(Path(sys.executable).parent / name)


def enter(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the entry script with nothing in its environment but what is given."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(DOCKER / "entrypoint.sh"), *words],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_a_planted_fault(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    text = (DOCKER / "Dockerfile.cpu").read_text()
    bad.write_text(text.replace("FROM ${BASE} AS python", "FROM debian:latest AS python"))
    done = subprocess.run([tool("hadolint"), str(bad)], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3007" in done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_runs_as_nobody_special_under_tini_and_from_the_lock(name: str) -> None:
    text = (DOCKER / name).read_text()
    kind = "cpu" if name.endswith("cpu") else "gpu"
    last = text[text.rindex("\nFROM ") :]
    assert "\nUSER 10001:10001\n" in last and "\nHEALTHCHECK " in last
    assert 'ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/pocl-entrypoint"]' in last
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) <= {"${BASE}", "${BUILD_BASE}", "python"}
    assert not re.search(r"^ARG (BUILD_)?BASE=", text, re.M)  # a default would go stale
    assert f"docker/requirements.{kind}.txt" in text
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert installs
    for line in installs:
        assert "--no-deps" in line and ("--require-hashes" in line or "--no-index" in line)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_the_version_that_was_tested(lock: str) -> None:
    text = (DOCKER / lock).read_text()
    pins, tested = read_pins(DOCKER / lock), read_pins(ROOT / "constraints.txt")
    entries = re.findall(
        r"^([\w.-]+)==\S+ \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n?)+)", text, re.M
    )
    assert len(entries) == len(pins) == len(re.findall(r"^\S+==", text, re.M)) > 80
    differing = {name for name in pins if name in tested and pins[name].public != str(tested[name])}
    assert differing == set()
    assert findings(pins, read_holes()) == []
    named = re.findall(r'^        "([\w.-]+)[>=\[]', (ROOT / "setup.py").read_text(), re.M)
    assert {canonicalize_name(name) for name in named} - {"track", "cluster", "dev"} <= set(pins)
    assert ("+cpu" in str(pins["torch"])) == ("cpu" in lock)
    assert str(pins["ray"]) == KubernetesConfig().ray_version


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_brings_no_cuda_to_the_cpu_and_all_of_it_to_the_gpu(lock: str) -> None:
    cuda = [name for name in read_pins(DOCKER / lock) if name.startswith(("nvidia-", "cuda-"))]
    assert bool(cuda) == ("gpu" in lock)


def test_only_two_packages_are_built_from_source_as_the_dockerfiles_say() -> None:
    awk = r"/^[^ ]/ {source = /^(deepspeed|rouge-score)==/}"
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert awk in (DOCKER / name).read_text()


def test_what_a_launcher_sets_goes_through_the_entry_script() -> None:
    done = enter("env", **LAUNCHER)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert LAUNCHER.items() <= found.items()
    assert found["NODE_RANK"] == "2"  # of JOB_COMPLETION_INDEX
    assert os.access(found["HOME"], os.W_OK)
    given = enter("env", **LAUNCHER, NODE_RANK="7").stdout
    assert "NODE_RANK=7\n" in given
    assert "NODE_RANK" not in enter("env", RANK="0", WORLD_SIZE="1").stdout


@pytest.mark.parametrize("code", [0, 64, 71, 75])
def test_exit_codes_pass_through_the_entry_script(code: int) -> None:
    assert enter("bash", "-c", f"exit {code}").returncode == code


def test_the_entry_script_becomes_the_command_so_that_signals_reach_it() -> None:
    assert enter("bash", "-c", "kill -TERM $$").returncode == -15


def test_half_of_a_launchers_variables_is_a_mistake() -> None:
    done = enter("env", RANK="0")
    assert done.returncode == 2 and "WORLD_SIZE is not set" in done.stderr


def test_a_word_that_is_no_program_is_a_command_of_pocl_dist(tmp_path: Path) -> None:
    stub = tmp_path / "pocl-dist"
    stub.write_text('#!/bin/sh\necho "pocl-dist $*"; exit 66\n')
    stub.chmod(0o700)
    path = f"{tmp_path}:/usr/bin:/bin"
    for word in ("plan", "distill", "--help"):
        done = enter(word, "x.yaml", PATH=path)
        assert (done.returncode, done.stdout) == (66, f"pocl-dist {word} x.yaml\n")


@pytest.mark.parametrize(("code", "is_healthy"), [(0, 1), (66, 1), (75, 1), (71, 0), (65, 0)])
def test_a_container_is_healthy_unless_its_run_failed(
    tmp_path: Path, code: int, is_healthy: int
) -> None:
    stub = tmp_path / "pocl-dist"
    stub.write_text(f'#!/bin/sh\n[ "$1 $2" = "outcome /runs/x" ] && exit {code}\nexit 9\n')
    stub.chmod(0o700)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POCL_DIST_RUN_DIR": "/runs/x"}
    done = subprocess.run(["bash", str(DOCKER / "healthcheck.sh")], env=environment)
    assert done.returncode == (0 if is_healthy else 1)


def test_the_compiler_of_the_image_builds_for_the_oldest_cpu(tmp_path: Path) -> None:
    stub = tmp_path / "g++"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o700)
    words = ["bash", str(DOCKER / "portable_cxx.sh"), "-O3", "-g", "-march=native", "-D__AVX512__"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "-O3 -g0 -march=x86-64-v3 -D__AVX256__\n"


def test_the_build_context_holds_only_what_the_package_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert allowed == {
        "pocl_dist", "configs", "launch", "docker", "setup.py", "pyproject.toml", "README.md",
        "LICENSE",
    }  # fmt: skip
