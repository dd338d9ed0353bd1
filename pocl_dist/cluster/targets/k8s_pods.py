"""What all pods have in common: image, user, storage, place, limits. YAML as data."""

from __future__ import annotations

from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.files import JSONValue

USER = 10001
"""Of docker/Dockerfile."""
SCRIPTS = "/etc/pocl"
"""Where config and scripts are mounted."""
CONTAINER = "pocl"
SLACK_SECONDS = 30
"""After the grace that a step has to save: for its processes to end, before they are killed."""

Mapping = dict[str, JSONValue]


def labels_of(plan: LaunchPlan, job: str | None = None) -> Mapping:
    """Returns the labels of what belongs to the run, and to one job of it."""
    own: Mapping = {"app.kubernetes.io/name": "pocl-dist", "pocl-run": plan.name}
    if job is not None:
        own["pocl-job"] = job
    return {**plan.config.launch.k8s.labels, **own}


def metadata(plan: LaunchPlan, name: str, digest: str) -> Mapping:
    """Returns name, namespace and labels of an object, and the config that it was made for."""
    return {
        "name": name,
        "namespace": plan.config.launch.k8s.namespace,
        "labels": labels_of(plan, name),
        "annotations": {"pocl-config": digest},
    }


def resources(plan: LaunchPlan, is_driver: bool) -> Mapping:
    """Returns requests equal to limits: memory that is not there when it is needed kills a rank."""
    k8s = plan.config.launch.k8s
    amounts: Mapping = {"cpu": k8s.cpu, "memory": k8s.memory}
    if is_driver:
        amounts = {"cpu": k8s.driver_cpu, "memory": k8s.driver_memory}
    elif plan.gpus_per_node:
        amounts[k8s.gpu_resource] = str(plan.gpus_per_node)
    return {"requests": amounts, "limits": dict(amounts)}


def container(
    plan: LaunchPlan,
    name: str,
    is_driver: bool,
    command: list[JSONValue] | None = None,
    environment: list[JSONValue] | None = None,
) -> Mapping:
    """Returns a container; without `command` what the operator or the image says is run."""
    launch = plan.config.launch
    given: list[JSONValue] = [
        {"name": key, "value": value} for key, value in launch.environment.items()
    ]
    made: Mapping = {
        "name": name,
        "image": launch.k8s.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": launch.folder,
        "env": [*(environment or []), *given],
        "envFrom": [{"secretRef": {"name": secret}} for secret in launch.k8s.secrets],
        "resources": resources(plan, is_driver),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "data", "mountPath": launch.k8s.mount_path},
            {"name": "scripts", "mountPath": SCRIPTS, "readOnly": True},
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "home", "mountPath": "/home/pocl"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if command is not None:
        made["args"] = command  # the image's entry point is tini, and passes it on
    return {key: value for key, value in made.items() if value != []}


def pod_template(plan: LaunchPlan, job: str, main: Mapping) -> Mapping:
    """Returns the template of a pod with one container, for an unprivileged user."""
    launch = plan.config.launch
    k8s = launch.k8s
    made: Mapping = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_seconds + SLACK_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "serviceAccountName": k8s.service_account,
        "priorityClassName": k8s.priority_class,
        "nodeSelector": dict(k8s.node_selector),
        "tolerations": list(k8s.tolerations),
        "imagePullSecrets": [{"name": k8s.image_pull_secret}] if k8s.image_pull_secret else [],
        "containers": [main],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": k8s.claim}},
            {"name": "scripts", "configMap": {"name": f"{plan.name}-scripts"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "home", "emptyDir": {}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": k8s.shared_memory},
            },
        ],
    }
    spec: Mapping = {key: value for key, value in made.items() if value not in (None, [], {})}
    return {"metadata": {"labels": labels_of(plan, job)}, "spec": spec}
