"""Config section of `pocl-dist launch --target k8s`: what a pod is and where it may run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue, StringConstraints

from pocl_dist.config.section import Section, Text

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Path = Annotated[str, StringConstraints(pattern=r"^/[^\x00\n\r:]*[^\x00\n\r:/]$")]
DnsName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)
]


class KubernetesConfig(Section):
    """Pods, their image, storage and place."""

    namespace: DnsName = "default"
    """Where everything is created."""
    image: Text | None = None
    """Required: the image of docker/, `NAME@sha256:DIGEST`, or with a tag that stays what it is;
    without either, and `:latest`, are refused."""
    image_pull_secret: DnsName | None = None
    """Secret for the image's registry."""
    claim: DnsName | None = None
    """Required: a PersistentVolumeClaim (ReadWriteMany with several nodes) that holds run
    directory, data and models."""
    mount_path: Path = "/data"
    """Where the claim is mounted. Relative paths count from here (or `launch.folder` in it)."""
    gpu_resource: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[\w.-]+$")] = (
        "nvidia.com/gpu"
    )
    """How the cluster calls a GPU."""
    cpu: Quantity = "8"
    """CPUs of a pod with ranks or actors."""
    memory: Quantity = "64Gi"
    """Its memory, shared memory included."""
    shared_memory: Quantity = "16Gi"
    """Its /dev/shm: NCCL, Ray's object store."""
    driver_cpu: Quantity = "2"
    """CPUs of a pod that only reads and writes files: plan, report, the head of Ray."""
    driver_memory: Quantity = "16Gi"
    """Its memory."""
    service_account: DnsName | None = None
    """Null: the namespace's default; its token is never mounted."""
    priority_class: DnsName | None = None
    """PriorityClass of all pods."""
    node_selector: dict[Text, str] = {}
    """Labels of the nodes that may be used."""
    tolerations: list[dict[str, JsonValue]] = []
    """Of taints, as Kubernetes writes them."""
    labels: dict[Text, str] = {}
    """More labels of jobs and pods, e.g. of a queue."""
    secrets: list[DnsName] = []
    """Secrets whose keys become variables of all pods, e.g. a hub's token."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """How often a step is started again after a retryable exit code (69, 71, 75); pods that the
    cluster takes away (preemption, drain) do not count."""
    deadline_hours: Annotated[float, Field(gt=0)] | None = None
    """A step that takes longer is ended, restarts included; null: no limit."""
    pending_minutes: Annotated[int, Field(ge=1)] = 60
    """A Ray cluster that has not started after this long fails its step."""
    ray_version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")] = "2.60.0"
    """Ray in the image; KubeRay wants to know."""
