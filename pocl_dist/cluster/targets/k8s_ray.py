"""KubeRay's RayJob: a Ray cluster of its own for one pass, with token and without open ports."""

from __future__ import annotations

from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.targets.k8s_pods import (
    SCRIPTS,
    Mapping,
    container,
    metadata,
    pod_template,
)
from pocl_dist.distributed.ray_session import OBJECT_STORE_BYTES
from pocl_dist.files import JSONValue

SECONDS_KEPT = 300
"""A finished cluster stays so long for its logs."""


def ray_job(plan: LaunchPlan, step: str, name: str, digest: str) -> Mapping:
    """Returns the RayJob of a pass: a head without work, and a worker per node with all its GPUs.

    KubeRay makes the token (`authOptions`) and the network policy; its job server runs the step
    on the head, and says no more of its end than good or bad: RUN/status.json has the code.
    """
    k8s = plan.config.launch.k8s
    environment: list[JSONValue] = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    head = container(plan, "ray-head", is_driver=True, environment=environment)
    head["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
    ]
    worker = container(plan, "ray-worker", is_driver=False, environment=environment)
    submitter = container(plan, "ray-job-submitter", is_driver=True, environment=environment)
    submitter["resources"] = {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"cpu": "500m", "memory": "1Gi"},
    }
    store: Mapping = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    spec: Mapping = {
        "entrypoint": f"bash {SCRIPTS}/step.sh {step}",
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": pod_template(plan, name, submitter),
        "backoffLimit": k8s.max_restarts,
        "preRunningDeadlineSeconds": 60 * k8s.pending_minutes,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": SECONDS_KEPT,
        "rayClusterSpec": {
            "rayVersion": k8s.ray_version,
            "authOptions": {"mode": "token"},
            "networkPolicy": {"mode": "DenyAllIngress"},
            "headGroupSpec": {
                # 0 CPUs: no actor runs on the head. Operator and submitter reach the job server
                # over the network, so it cannot listen on loopback: token and policy guard it.
                "rayStartParams": {**store, "num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": pod_template(plan, name, head),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": plan.nodes,
                    "minReplicas": plan.nodes,
                    "maxReplicas": plan.nodes,
                    "rayStartParams": dict(store),
                    "template": pod_template(plan, name, worker),
                }
            ],
        },
    }
    if k8s.deadline_hours is not None:
        spec["activeDeadlineSeconds"] = int(3600 * k8s.deadline_hours)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(plan, name, digest),
        "spec": spec,
    }
