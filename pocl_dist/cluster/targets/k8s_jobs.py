"""Jobs of Kubernetes: one pod, or a pod per node whose ranks meet; what they need around them."""

from __future__ import annotations

from typing import cast

from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.targets.k8s_pods import (
    CONTAINER,
    SCRIPTS,
    Mapping,
    container,
    metadata,
    pod_template,
)
from pocl_dist.errors import EXIT_CODES
from pocl_dist.files import JSONValue


def job(plan: LaunchPlan, name: str, digest: str, template: Mapping, pods: int) -> Mapping:
    """Returns a Job of so many pods; `launch.k8s.max_restarts` is meant for all of them."""
    k8s = plan.config.launch.k8s
    spec: Mapping = {
        # When one pod is lost, all of its step end, and each counts.
        "backoffLimit": k8s.max_restarts * pods,
        "podFailurePolicy": failure_policy(),
        # Not before the old pod is gone: two would write the same run directory.
        "podReplacementPolicy": "Failed",
        "template": template,
    }
    if k8s.deadline_hours is not None:
        spec["activeDeadlineSeconds"] = int(3600 * k8s.deadline_hours)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(plan, name, digest),
        "spec": spec,
    }


def failure_policy() -> Mapping:
    """Returns what the Job does about an exit code, as the table of exit codes says.

    What is in no table (137: killed, e.g. for memory) counts, as Kubernetes does without a rule.
    """
    retryable: list[JSONValue] = [row.code for row in EXIT_CODES if row.is_retryable]
    final: list[JSONValue] = [row.code for row in EXIT_CODES if row.code and not row.is_retryable]

    def rule(action: str, codes: list[JSONValue]) -> Mapping:
        found: Mapping = {"containerName": CONTAINER, "operator": "In", "values": codes}
        return {"action": action, "onExitCodes": found}

    taken_away: JSONValue = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": taken_away},
            rule("Count", retryable),
            rule("FailJob", final),
        ]
    }


def ranks_job(plan: LaunchPlan, step: str, name: str, digest: str) -> Mapping:
    """Returns the Indexed Job of a step of ranks: a pod per node, which knows its number."""
    environment: list[JSONValue] = [{"name": "MASTER_ADDR", "value": f"{name}-0.{name}"}]
    command: list[JSONValue] = ["bash", f"{SCRIPTS}/node.sh", step]
    main = container(plan, CONTAINER, False, command, environment)
    template = pod_template(plan, name, main)
    spec = cast("Mapping", template["spec"])
    spec["subdomain"] = name
    term: Mapping = {
        "labelSelector": {"matchLabels": {"pocl-job": name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    if plan.gpus_per_node:
        spec["affinity"] = {
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
        }
    made = job(plan, name, digest, template, plan.nodes)
    cast("Mapping", made["spec"]).update(
        {"completionMode": "Indexed", "completions": plan.nodes, "parallelism": plan.nodes}
    )
    return made


def service(plan: LaunchPlan, name: str, digest: str) -> Mapping:
    """Returns the headless service that gives pods names, before they are ready too."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(plan, name, digest),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"pocl-job": name},
            "ports": [{"name": "rendezvous", "port": plan.config.launch.master_port}],
        },
    }


def disruption_budget(plan: LaunchPlan, name: str, digest: str) -> Mapping:
    """Returns the budget against drains. For pods of Jobs only `minAvailable` is defined."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(plan, name, digest),
        "spec": {"minAvailable": plan.nodes, "selector": {"matchLabels": {"pocl-job": name}}},
    }


def network_policy(plan: LaunchPlan, digest: str) -> Mapping:
    """Returns the policy: pods of the run are reached by pods of the run. Ray's pods have another.

    Gradients and the rendezvous are neither encrypted nor authenticated.
    """
    own: Mapping = {"matchLabels": {"pocl-run": plan.name}}
    ray: Mapping = {"key": "ray.io/cluster", "operator": "DoesNotExist"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(plan, f"{plan.name}-ranks", digest),
        "spec": {
            "podSelector": {**own, "matchExpressions": [ray]},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": own}]}],
        },
    }
