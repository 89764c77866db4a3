"""What the tests of the manifests share: the documents, their pods, and who may reach whom."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
SCHEMAS = Path(ROOT).parent / "shared" / "schemas"
RAYJOBS = ("rayjob-train.yaml", "rayjob-tune.yaml")
PLAIN = ("storage.yaml", "network-policy.yaml")


@cache
def documents(name: str) -> list[Any]:
    """The documents of a file of cluster/."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(name: str, kind: str) -> list[Any]:
    """Those of one kind."""
    return [document for document in documents(name) if document["kind"] == kind]


def rayjob(name: str) -> Any:
    """The one RayJob of a file."""
    [job] = of_kind(name, "RayJob")
    return job


def worker_groups(name: str) -> list[Any]:
    """The worker groups of a RayJob."""
    return rayjob(name)["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def pod_templates(name: str) -> dict[str, Any]:
    """The templates of all pods of a RayJob: submitter, head, and each worker group."""
    spec = rayjob(name)["spec"]
    templates = {
        "submitter": spec["submitterPodTemplate"],
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"],
    }
    return templates | {group["groupName"]: group["template"] for group in worker_groups(name)}


def containers(name: str) -> Iterator[tuple[str, Any]]:
    """Every container of a RayJob, with the name of its pod."""
    for pod, template in pod_templates(name).items():
        for container in template["spec"]["containers"]:
            yield pod, container


def unknown_fields(value: Any, schema: Mapping[str, Any], where: str = "") -> list[str]:
    """Fields that a CRD's schema does not have, which Kubernetes would drop without a word.

    Metadata is open in a CRD's schema; Kubernetes checks it by its own.
    """
    if isinstance(value, list):
        items = [unknown_fields(v, schema["items"], f"{where}[{i}]") for i, v in enumerate(value)]
        return [field for found in items for field in found]
    if not isinstance(value, dict) or where.endswith(".metadata"):
        return []
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    unknown = []
    for key, part in value.items():
        part_schema = known.get(key, rest)
        if isinstance(part_schema, dict):
            unknown += unknown_fields(part, part_schema, f"{where}.{key}")
        else:
            unknown.append(f"{where}.{key}")
    return unknown


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; only with the operator In."""
    wanted = {key: [value] for key, value in selector.get("matchLabels", {}).items()}
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        wanted[expression["key"]] = expression["values"]
    return all(labels.get(key) in values for key, values in wanted.items())


def may_connect(
    policies: list[Any],
    peer: Mapping[str, str],
    target: Mapping[str, str],
    port: int,
    peer_namespace: str | None = None,
) -> bool:
    """Whether policies let a pod connect to another: by labels, as Kubernetes puts them together.

    Args:
        policies: all NetworkPolicies of the namespace of `target`.
        peer: labels of the pod that connects.
        target: labels of the pod that is connected to.
        port: of `target`, TCP.
        peer_namespace: where `peer` is; None: in the namespace of `target`.
    """
    applying = [policy for policy in policies if selects(policy["spec"]["podSelector"], target)]
    rules = [rule for policy in applying for rule in policy["spec"].get("ingress", ())]
    return not applying or any(
        _is_peer(source, peer, peer_namespace)
        for rule in rules
        if "ports" not in rule or port in [entry["port"] for entry in rule["ports"]]
        for source in rule["from"]
    )


def _is_peer(
    source: Mapping[str, Any], peer: Mapping[str, str], peer_namespace: str | None
) -> bool:
    if "namespaceSelector" in source:
        namespace = {"kubernetes.io/metadata.name": peer_namespace or "the same"}
        if not selects(source["namespaceSelector"], namespace):
            return False
    elif peer_namespace is not None:
        return False
    return selects(source.get("podSelector", {}), peer)
