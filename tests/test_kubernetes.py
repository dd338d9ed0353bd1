"""What `launch --target k8s` renders: against the real schemas, and against rules of our own."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pocl_dist.cluster.launch_plan import make_plan
from pocl_dist.cluster.targets import k8s
from pocl_dist.errors import EXIT_CODES, ConfigError, UnavailableError
from tests.conftest import SHARED

DIGEST = "a" * 64
IMAGE = f"registry.example/team/pocl-dist@sha256:{DIGEST}"
NEEDED = [f"launch.k8s.image={IMAGE}", "launch.k8s.claim=pocl"]
VERSIONS = ("1.31", "1.34", "1.37")  # podFailurePolicy is stable since 1.31
CRD = SHARED / "data" / "k8s" / "ray.io_rayjobs.yaml"
RUNS = {
    "gpu": ["configs/gpt2_dolly.yaml", "launch.nodes=2", "launch.gpus_per_node=8"],
    "cpu": ["configs/tiny_cpu.yaml", "launch.nodes=2", "launch.gpus_per_node=0"],
    "all": [
        "configs/tiny_seqkd.yaml",
        "launch.nodes=1",
        "launch.gpus_per_node=2",
        "teacher.source=cache_hidden",
        "teacher.cache_engine=zero3",
        "launch.k8s.node_selector={accelerator: a100}",
        "launch.k8s.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
        "launch.k8s.labels={kueue.x-k8s.io/queue-name: research}",
        "launch.k8s.secrets=[hub-token]",
        "launch.k8s.image_pull_secret=registry",
        "launch.k8s.service_account=pocl",
        "launch.k8s.priority_class=low",
        "launch.k8s.deadline_hours=12",
        "launch.environment={NCCL_IB_HCA: mlx5}",
    ],
}


@cache
def files_of(run: str, *more: str) -> dict[str, str]:
    """Returns the rendered files of one of RUNS."""
    return k8s.render(make_plan([*RUNS[run], *NEEDED, *more]))


def objects_of(run: str) -> list[dict[str, Any]]:
    """Returns all objects in the rendered YAML files."""
    texts = [
        text
        for name, text in files_of(run).items()
        if name.endswith(".yaml") and name != "config.yaml"
    ]
    return [found for text in texts for found in yaml.safe_load_all(text)]


def kind_of(run: str, kind: str) -> list[dict[str, Any]]:
    """Returns the objects of a kind."""
    return [found for found in objects_of(run) if found["kind"] == kind]


def pod_templates(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the pod templates of a Job or a RayJob."""
    spec = found.get("spec", {})
    if found["kind"] == "Job":
        yield spec["template"]
    elif found["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
        yield spec["rayClusterSpec"]["headGroupSpec"]["template"]
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
            yield group["template"]


def all_templates(run: str) -> list[dict[str, Any]]:
    """Returns the templates of all pods of a run."""
    return [template for found in objects_of(run) for template in pod_templates(found)]


def closed(schema: Any) -> Any:
    """Returns a CRD's schema as JSON Schema that refuses every key which it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in made or "x-kubernetes-preserve-unknown-fields" in made
    if made.get("type") == "object" and "properties" in made and not is_open:
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", False):
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return made


@cache
def ray_job_validator() -> Any:
    """Returns what checks a RayJob against KubeRay's definition, which lies beside the project."""
    if not CRD.exists():
        line = "!" * 80
        print(f"\n{line}\n! {CRD} is not here: RayJobs are NOT checked against the CRD\n{line}")
        pytest.skip(f"{CRD}, the definition of KubeRay's RayJob, is not on this machine")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(CRD.read_text(), Loader=loader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    # Of the metadata an API server checks what the CRD does not say.
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def complaints(found: dict[str, Any], version: str = VERSIONS[-1]) -> list[str]:
    """Returns what is wrong with an object; the pods of a RayJob are checked as Pods."""
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        for template in pod_templates(found)
    ]
    lines = []
    if found["kind"] == "RayJob":
        lines += [error.message for error in ray_job_validator().iter_errors(found)]
        checked = pods
    else:
        checked = [found, *pods]
    for item in checked:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            lines.append(error.message)
    return lines


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("run", RUNS)
def test_every_object_fits_the_schema_of_kubernetes(run: str, version: str) -> None:
    found = [item for item in objects_of(run) if item["kind"] != "RayJob"]
    assert {"ConfigMap", "NetworkPolicy", "Job", "Service", "PodDisruptionBudget"} == {
        item["kind"] for item in found
    }
    assert [complaints(item, version) for item in found] == [[]] * len(found)


@pytest.mark.parametrize("run", RUNS)
def test_every_ray_job_fits_kuberays_definition(run: str) -> None:
    found = kind_of(run, "RayJob")
    assert found and [complaints(item) for item in found] == [[]] * len(found)


def put(value: dict[str, Any], path: str, new: object) -> None:
    """Sets what lies at a dotted path; numbers are places in a list."""
    *parents, last = path.split(".")
    place: Any = value
    for part in parents:
        place = place[int(part)] if part.isdecimal() else place[part]
    place[last] = new


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Job", "spec.backofLimit", 3),
        ("Job", "spec.podFailurePolicy.rules.1.onExitCodes.operater", "In"),
        ("Job", "spec.completionMode", 1),
        ("Job", "spec.template.spec.terminationGracePeriodSecond", 30),
        ("Job", "spec.template.spec.containers.0.resorces", {}),
        ("Service", "spec.publishNotReadyAddress", True),
        ("PodDisruptionBudget", "spec.minAvailabel", 1),
        ("NetworkPolicy", "spec.ingress.0.form", []),
        ("RayJob", "spec.backofLimit", 3),
        ("RayJob", "spec.rayClusterSpec.authOptions.mode", "tokn"),
        ("RayJob", "spec.rayClusterSpec.networkPolicy.mode", "DenyEverything"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resorces", {}),
    ],
)
def test_a_planted_mistake_is_found(kind: str, path: str, value: object) -> None:
    found = copy.deepcopy(kind_of("gpu", kind)[-1])
    assert complaints(found) == []
    put(found, path, value)
    assert complaints(found) != []


@pytest.mark.parametrize("run", RUNS)
def test_no_pod_may_more_than_it_needs(run: str) -> None:
    for template in all_templates(run):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for item in spec["containers"]:
            assert item["image"] == IMAGE
            assert item["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert item["resources"]["requests"] == item["resources"]["limits"]
            assert {"/tmp", "/home/pocl"} <= {mount["mountPath"] for mount in item["volumeMounts"]}


@pytest.mark.parametrize("run", RUNS)
def test_jobs_treat_each_exit_code_as_the_table_says(run: str) -> None:
    action_of = {"retry": "Count", "final": "FailJob"}
    for job in kind_of(run, "Job"):
        rules = job["spec"]["podFailurePolicy"]["rules"]
        assert rules[0]["action"] == "Ignore"  # before all: who is taken away exits with 75 or so
        assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
        by_code = {
            code: rule["action"] for rule in rules[1:] for code in rule["onExitCodes"]["values"]
        }
        assert by_code == {
            row.code: action_of["retry" if row.is_retryable else "final"]
            for row in EXIT_CODES
            if row.code
        }
        container = job["spec"]["template"]["spec"]["containers"][0]["name"]
        assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {container}
        assert job["spec"]["podReplacementPolicy"] == "Failed"
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("grace", [20, 300, 1200])
def test_a_pod_has_the_grace_to_save_and_half_a_minute_more(grace: int) -> None:
    texts = files_of("gpu", f"launch.grace_seconds={grace}")
    (job,) = [
        found for found in yaml.safe_load_all(texts["3-distill.yaml"]) if found["kind"] == "Job"
    ]
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == grace + 30
    (config_map, _) = yaml.safe_load_all(texts["run.yaml"])
    assert f"export GRACE_SECONDS={grace}\n" in config_map["data"]["env.sh"]
    # torchrun gives its ranks ten seconds less than that before it kills them.
    assert "GRACE_SECONDS - 10" in config_map["data"]["torchrun.sh"]


def test_ranks_are_an_indexed_job_whose_pods_meet_at_pod_0() -> None:
    objects = list(yaml.safe_load_all(files_of("gpu")["3-distill.yaml"]))
    service, budget, job = objects
    assert [item["kind"] for item in objects] == ["Service", "PodDisruptionBudget", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    main = pod["containers"][0]
    assert main["args"] == ["bash", "/etc/pocl/node.sh", "distill"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    address = {"name": "MASTER_ADDR", "value": f"{job['metadata']['name']}-0.{pod['subdomain']}"}
    assert address in main["env"]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert budget["spec"]["minAvailable"] == 2


def test_steps_of_ranks_of_ray_and_of_one_process_are_jobs_of_their_kind() -> None:
    kinds = {
        name: list(yaml.safe_load_all(text))[-1]
        for name, text in files_of("all").items()
        if re.match(r"\d", name)
    }
    found = {name: item["spec"].get("completionMode", item["kind"]) for name, item in kinds.items()}
    assert found == {
        "1-generate.yaml": "RayJob",
        "2-plan.yaml": "Job",
        "3-cache.yaml": "Indexed",  # teacher.cache_engine: zero3
        "4-distill.yaml": "Indexed",
        "5-evaluate.yaml": "RayJob",
        "6-report.yaml": "Job",
    }


@pytest.mark.parametrize("run", RUNS)
def test_a_ray_cluster_has_a_token_and_is_closed_and_as_large_as_asked(run: str) -> None:
    for job in kind_of(run, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["networkPolicy"] == {"mode": "DenyAllIngress"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        (group,) = cluster["workerGroupSpecs"]
        nodes = int(next(word for word in RUNS[run] if "nodes=" in word)[-1])
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == nodes
        assert "runtimeEnvYAML" not in job["spec"]


def test_the_config_in_the_pods_names_the_ranks_and_the_cluster_that_is_there() -> None:
    (config_map, _) = yaml.safe_load_all(files_of("gpu")["run.yaml"])
    config = yaml.safe_load(config_map["data"]["config.yaml"])
    assert config["engine"]["world_size"] == 16
    assert config["ray"]["address"] == "auto"
    assert "cd /data || exit 74" in config_map["data"]["env.sh"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.k8s.image=null"], "launch.k8s.image: is required"),
        (["launch.k8s.claim=null"], "launch.k8s.claim: is required"),
        (["launch.k8s.image=pocl-dist"], "a tag other than latest"),
        (["launch.k8s.image=registry.example:5000/pocl-dist"], "a tag other than latest"),
        (["launch.k8s.image=pocl-dist:latest"], "a tag other than latest"),
        (["launch.k8s.image=pocl-dist@sha256:1234"], "a tag other than latest"),
        (["launch.name=My_Run"], "launch.name: 'My_Run' cannot name"),
        ([f"launch.name={'x' * 41}"], "at most 40"),
        (["run_dir=/home/me/run"], "run_dir: /home/me/run is outside of launch.k8s.mount_path"),
        (["run_dir=../run"], "run_dir: ../run is outside"),
        (
            ["run.scratch_dir=/local/nvme"],
            "run.scratch_dir: /local/nvme cannot be written in a pod",
        ),
        (["launch.folder=/scratch"], "launch.folder: /scratch is outside"),
        (["launch.master_address=node1"], "launch.master_address"),
        (["launch.k8s.memory=64 GB"], "launch.k8s.memory"),
        (["launch.k8s.mount_path=data"], "launch.k8s.mount_path"),
    ],
)
def test_what_cannot_run_in_pods_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        k8s.render(make_plan([*RUNS["gpu"], *NEEDED, *words]))


def test_a_tag_that_stays_and_a_registry_with_a_port_are_allowed() -> None:
    assert files_of("cpu", "launch.k8s.image=registry.example:5000/pocl-dist:1.4.2")


# A stand-in for the cluster: it keeps what is applied, and a look at a job brings it to its end.
KUBECTL = """#!/usr/bin/env bash
shift 2                                       # --namespace NAME
echo "$*" >>"$STATE/calls"
case $1 in
    apply) [ -z "${DOWN:-}" ] || { echo "The connection to the server was refused" >&2; exit 1; }
           name=$(basename "$3" .yaml); touch "$STATE/${name#*-}.new" ;;
    delete) name=$(basename "$3" .yaml); rm -f "$STATE/${name#*-}".* ;;
    get)
        if [ "$2" = pods ]; then echo "0 ${POD_CODE:-0}"; exit; fi
        step=${3#pocl-}
        if [ -e "$STATE/$step.done" ]; then echo "$DIGEST|SuccessCriteriaMet Complete "
        elif [ -e "$STATE/$step.failed" ]; then echo "$DIGEST|FailureTarget Failed "
        elif [ -e "$STATE/$step.new" ]; then
            if [ "$step" = "${FAILS:-}" ]; then end=failed; else end=done; fi
            mv "$STATE/$step.new" "$STATE/$step.$end"; echo "$DIGEST|"
        fi ;;
esac
"""


def run_submit(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a rendered submit.sh with KUBECTL as the cluster's client."""
    state = folder / "state"
    state.mkdir(exist_ok=True)
    client = folder / "kubectl"
    client.write_text(KUBECTL)
    client.chmod(0o700)
    files = files_of("gpu")
    for name, text in files.items():
        (folder / name).write_text(text)
    digest = re.search(r"^digest=(\w+)$", files["submit.sh"], re.MULTILINE)
    assert digest is not None
    given = {"KUBECTL": str(client), "STATE": str(state), "DIGEST": digest[1], "POLL_SECONDS": "0"}
    return subprocess.run(
        ["bash", str(folder / "submit.sh")],
        env={"PATH": os.environ["PATH"], **given, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def applied(folder: Path) -> list[str]:
    """Returns the files that were applied since the last question."""
    log = folder / "state" / "calls"
    lines = log.read_text().splitlines()
    log.unlink()
    return [Path(line.split()[2]).name for line in lines if line.startswith("apply")]


def test_steps_are_submitted_in_order_and_what_is_done_is_not_again(tmp_path: Path) -> None:
    done = run_submit(tmp_path)
    assert done.returncode == 0, done.stderr
    steps = ["1-measure", "2-plan", "3-distill", "4-evaluate", "5-report"]
    assert applied(tmp_path) == ["run.yaml", *(f"{step}.yaml" for step in steps)]
    assert run_submit(tmp_path).returncode == 0
    assert applied(tmp_path) == ["run.yaml"]


def test_a_failed_step_ends_the_chain_with_its_code_and_is_taken_up_again(tmp_path: Path) -> None:
    failed = run_submit(tmp_path, FAILS="plan", POD_CODE="65")
    assert failed.returncode == 65
    assert "job pocl-plan: failed" in failed.stderr
    assert applied(tmp_path) == ["run.yaml", "1-measure.yaml", "2-plan.yaml"]
    assert run_submit(tmp_path).returncode == 0
    assert applied(tmp_path)[1:] == [
        "2-plan.yaml", "3-distill.yaml", "4-evaluate.yaml", "5-report.yaml"
    ]  # fmt: skip


def test_another_config_replaces_the_jobs_of_the_one_before(tmp_path: Path) -> None:
    assert run_submit(tmp_path).returncode == 0
    applied(tmp_path)
    assert run_submit(tmp_path, DIGEST="0" * 16, FAILS="measure").returncode != 0
    assert applied(tmp_path) == ["run.yaml", "1-measure.yaml"]


def test_a_cluster_that_does_not_answer_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_submit(tmp_path, DOWN="yes").returncode == 69
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DOWN", "yes")
    plan = make_plan([*RUNS["gpu"], *NEEDED])
    with pytest.raises(UnavailableError, match="The connection to the server was refused"):
        k8s.submit(plan, tmp_path)
    assert not (tmp_path / k8s.LOG).exists()
