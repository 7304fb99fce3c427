"""The objects of the Kubernetes manifests, and the pods that they make."""

from collections.abc import Iterator
from typing import Any

from tests.cluster.deploy.commands import DEPLOY, documents

FOLDER = DEPLOY / "kuberay"
OBJECTS = [one for path in sorted(FOLDER.glob("*.yaml")) for one in documents(path)]
# The volume that the autoscaler's container alone mounts.
AUTOSCALER_TOKEN = "autoscaler-token"

Object = dict[str, Any]


def of_kind(kind: str, name: str | None = None) -> Object:
    (found,) = [one for one in OBJECTS if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def ray_clusters() -> list[Object]:
    """The specs of Ray clusters: the one that stays, and the job's."""
    return [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]


def pods_of(one: Object) -> Iterator[Object]:
    """The specs of all pods that an object makes."""
    spec = one["spec"]
    match one["kind"]:
        case "Pod":
            yield spec
        case "Deployment":
            yield spec["template"]["spec"]
        case "RayCluster" | "RayJob":
            if "submitterPodTemplate" in spec:
                yield spec["submitterPodTemplate"]["spec"]
            spec = spec.get("rayClusterSpec", spec)
            yield from (group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
