"""k8s: a file per step. Ranks are an Indexed Job, passes a RayJob of KubeRay, the rest plain Jobs.

Kubernetes knows no order of jobs: `submit.sh`, rendered beside them, creates one after the other.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import cast

import yaml

from pocl_dist.cluster.apart import start_apart
from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.targets.k8s_jobs import (
    disruption_budget,
    job,
    network_policy,
    ranks_job,
    service,
)
from pocl_dist.cluster.targets.k8s_pods import (
    CONTAINER,
    SCRIPTS,
    Mapping,
    container,
    metadata,
    pod_template,
)
from pocl_dist.cluster.targets.k8s_ray import ray_job
from pocl_dist.cluster.templates import fill
from pocl_dist.config.shipped import launch_file
from pocl_dist.config.steps import is_actors_work
from pocl_dist.errors import ConfigError, UnavailableError
from pocl_dist.files import JSONValue, digest_of

LOG = "submit.log"
LONGEST_NAME = 40
"""A pod is called NAME-init-student-INDEX-xxxxx, in 63 letters."""


def render(plan: LaunchPlan) -> dict[str, str]:
    """Returns `submit.sh`, `run.yaml` (config, scripts, network policy) and a file per step.

    `config.yaml` is for the reader: the pods have it from `run.yaml`.
    """
    plan = _in_pods(plan)
    scripts = _scripts(plan)
    digest = digest_of(cast("JSONValue", scripts))[:16]
    files = {"run.yaml": _dump(_config_map(plan, scripts, digest), network_policy(plan, digest))}
    entries = []
    for number, step in enumerate(plan.steps, start=1):
        file, name = f"{number}-{step}.yaml", f"{plan.name}-{step}"
        objects = _objects(plan, step, name, digest)
        files[file] = _dump(*objects)
        entries.append(f"{file}/{str(objects[-1]['kind']).lower()}/{name}")
    values = {"namespace": plan.config.launch.k8s.namespace, "digest": digest, "entries": entries}
    submit_sh = fill("k8s/submit.sh", values)
    return {"config.yaml": scripts["config.yaml"], **files, "submit.sh": submit_sh}


def submit(plan: LaunchPlan, folder: Path) -> str:
    """Asks the cluster once, then starts `submit.sh` apart from the terminal; returns the jobs."""
    namespace = plan.config.launch.k8s.namespace
    line = ["kubectl", "--namespace", namespace, "apply", "-f", str(folder / "run.yaml")]
    try:
        subprocess.run(line, check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise UnavailableError(f"kubectl is not installed: start {folder}/submit.sh") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"kubectl: no answer of the cluster in {error.timeout} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["no reason given"]
        raise UnavailableError(f"kubectl apply: {said[-1]}") from error
    pid = start_apart(folder / "submit.sh", folder / LOG)
    names = "\n".join(f"{plan.name}-{step}" for step in plan.steps)
    return (
        f"{names}\nlaunch: process {pid} submits them one after the other, its output is "
        f"in {folder / LOG}; if it is stopped, `bash {folder}/submit.sh` goes on"
    )


def _in_pods(plan: LaunchPlan) -> LaunchPlan:
    """Returns the plan with the working folder of the pods; ConfigError (64) for what cannot be."""
    launch, mount = plan.config.launch, plan.config.launch.k8s.mount_path
    for key in ("image", "claim"):
        if getattr(launch.k8s, key) is None:
            raise ConfigError(f"launch.k8s.{key}: is required with the target k8s")
    _check_image(str(launch.k8s.image))
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", launch.name) or (
        len(launch.name) > LONGEST_NAME
    ):
        raise ConfigError(
            f"launch.name: {launch.name!r} cannot name things in Kubernetes: lower-case letters, "
            f"digits and -, at most {LONGEST_NAME}"
        )
    if launch.master_address is not None:
        raise ConfigError("launch.master_address: the target k8s finds pod 0 itself; set null")
    folder = launch.folder or mount
    for key, path in (("launch.folder", folder), ("run_dir", plan.run_dir)):
        whole = PurePosixPath(folder, path)
        if ".." in whole.parts or not whole.is_relative_to(mount):
            raise ConfigError(
                f"{key}: {path} is outside of launch.k8s.mount_path {mount}: it would be lost "
                "with the pod"
            )
    scratch = plan.config.run.scratch_dir
    writable = (mount, "/tmp", "/home/pocl", "/dev/shm")
    if scratch is not None and not any(
        PurePosixPath(folder, scratch).is_relative_to(place) for place in writable
    ):
        raise ConfigError(
            f"run.scratch_dir: {scratch} cannot be written in a pod: only under "
            f"{', '.join(writable)}"
        )
    launch = launch.model_copy(update={"folder": folder})
    return replace(plan, config=plan.config.model_copy(update={"launch": launch}))


def _check_image(image: str) -> None:
    """Raises ConfigError (64) for an image that can be another one tomorrow."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    is_pinned = (
        re.fullmatch(r"sha256:[0-9a-f]{64}", digest) if digest else tag not in ("", "latest")
    )
    if not is_pinned or re.search(r"\s", image):
        raise ConfigError(
            f"launch.k8s.image: {image!r} is not allowed: NAME@sha256:DIGEST, or NAME:TAG with a "
            "tag other than latest; pods that start later would run something else"
        )


def _scripts(plan: LaunchPlan) -> dict[str, str]:
    """Returns what the pods find in SCRIPTS."""
    launch = plan.config.launch
    node = {
        "nodes": plan.nodes,
        "ranks_per_node": plan.ranks_per_node,
        "master_port": launch.master_port,
        "join_seconds": launch.join_seconds,
    }
    return {
        **common_files(plan, ranks_with="torchrun", ray_address="auto"),
        "node.sh": fill("k8s/node.sh", node),
        "step.sh": launch_file("k8s/step.sh").read_text(encoding="utf-8"),
        "torchrun.sh": launch_file("torchrun.sh").read_text(encoding="utf-8"),
    }


def _objects(plan: LaunchPlan, step: str, name: str, digest: str) -> list[Mapping]:
    """Returns what a step needs; the job itself comes last."""
    if plan.is_ranks_work(step):
        return [
            service(plan, name, digest),
            disruption_budget(plan, name, digest),
            ranks_job(plan, step, name, digest),
        ]
    if is_actors_work(step, plan.config):
        return [ray_job(plan, step, name, digest)]
    command: list[JSONValue] = ["bash", f"{SCRIPTS}/step.sh", step]
    template = pod_template(plan, name, container(plan, CONTAINER, True, command))
    return [job(plan, name, digest, template, 1)]


def _config_map(plan: LaunchPlan, scripts: dict[str, str], digest: str) -> Mapping:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(plan, f"{plan.name}-scripts", digest),
        "data": dict(scripts),
    }


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, as people write it; no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)


def _dump(*objects: Mapping) -> str:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
