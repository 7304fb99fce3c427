"""No pod may do more than its work needs: privileges, tokens of Kubernetes, connections."""

from collections.abc import Iterator
from typing import Any

import pytest
from ray.autoscaler._private.kuberay import node_provider

from tests.cluster.deploy.manifests import AUTOSCALER_TOKEN, OBJECTS, Object, of_kind, pods_of, ray_clusters

RAY = {"app.kubernetes.io/part-of": "slimllm"}
DRIVER = {**RAY, "app.kubernetes.io/component": "driver"}
WORKER = {**RAY, "app.kubernetes.io/component": "worker"}
SUBMITTER = {**RAY, "app.kubernetes.io/component": "submitter"}
MLFLOW = {"app.kubernetes.io/name": "slimllm-mlflow"}
FILES = {"app.kubernetes.io/name": "slimllm-files"}
# As KubeRay's chart labels it; it may run in another namespace.
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
OTHER: dict[str, str] = {"app": "other"}
OURS, ELSEWHERE = "ours", "elsewhere"
POLICIES = [one for one in OBJECTS if one["kind"] == "NetworkPolicy"]


def containers() -> Iterator[tuple[Object, Object]]:
    """Every container that an object names, with its pod."""
    for pod in (pod for one in OBJECTS for pod in pods_of(one)):
        yield from ((pod, container) for container in (*pod["containers"], *pod.get("initContainers", [])))


def test_no_container_has_privileges_or_system_calls_to_spare() -> None:
    """What Kubernetes calls the restricted profile."""
    found = list(containers())
    assert len(found) == 7
    for pod, container in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
        require_restricted(container["securityContext"])
    for spec in ray_clusters():
        # KubeRay adds this container to the head's pod.
        require_restricted(spec["autoscalerOptions"]["securityContext"])


def require_restricted(context: Object) -> None:
    assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_autoscaler_alone_has_a_token_of_kubernetes() -> None:
    assert all(pod["automountServiceAccountToken"] is False for pod, _ in containers())
    for pod, container in containers():
        tokens = [volume["name"] for volume in pod.get("volumes", []) if "projected" in volume]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert not mounted & set(tokens)
    for spec in ray_clusters():
        (mount,) = spec["autoscalerOptions"]["volumeMounts"]
        assert (mount["name"], mount["readOnly"]) == (AUTOSCALER_TOKEN, True)
        volumes = {volume["name"]: volume for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}
        token, authority, _ = volumes[AUTOSCALER_TOKEN]["projected"]["sources"]
        files = [token["serviceAccountToken"]["path"], authority["configMap"]["items"][0]["path"]]
        places = [f"{mount['mountPath']}/{file}" for file in files]
        assert places == [node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH]


def test_every_pod_has_the_labels_that_policies_choose_it_by() -> None:
    for one in OBJECTS:
        spec = one["spec"]
        match one["kind"]:
            case "Pod":
                assert one["metadata"]["labels"] == FILES
            case "Deployment":
                assert spec["template"]["metadata"]["labels"] == MLFLOW
            case "RayCluster" | "RayJob":
                cluster = spec.get("rayClusterSpec", spec)
                assert cluster["headGroupSpec"]["template"]["metadata"]["labels"] == DRIVER
                assert [g["template"]["metadata"]["labels"] for g in cluster["workerGroupSpecs"]] == [WORKER]
    assert of_kind("RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"] == SUBMITTER


def chooses(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether a selector chooses a pod; an empty one chooses all."""
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def fits(rule: Object, key: str, labels: dict[str, str], namespace: str, port: int) -> bool:
    """Whether a rule of a policy allows a connection: its peer and its port; what it does not name is not limited."""
    if "ports" in rule and port not in [one["port"] for one in rule["ports"]]:
        return False
    if key not in rule:
        return True
    # Without a selector of namespaces, a peer is in the policy's own.
    return any(
        chooses(peer["podSelector"], labels) and (namespace == OURS or "namespaceSelector" in peer)
        for peer in rule[key]
    )


def passes(kind: str, chosen: dict[str, str], other: dict[str, str], namespace: str, port: int) -> bool:
    """Whether the policies that choose a pod let it connect (Egress), or be connected to (Ingress)."""
    mine: list[Any] = [one["spec"] for one in POLICIES if chooses(one["spec"]["podSelector"], chosen)]
    limiting = [spec for spec in mine if kind in spec["policyTypes"]]
    key = {"Ingress": "from", "Egress": "to"}[kind]
    rules = [rule for spec in limiting for rule in spec.get(kind.lower(), [])]
    return not limiting or any(fits(rule, key, other, namespace, port) for rule in rules)


def connects(source: dict[str, str], to: dict[str, str], port: int, namespace: str = OURS) -> bool:
    leaves = namespace == ELSEWHERE or passes("Egress", source, to, OURS, port)
    return leaves and passes("Ingress", to, source, namespace, port)


@pytest.mark.parametrize(
    ("source", "to", "port"),
    [
        *(
            (one, other, port)
            for one in (DRIVER, WORKER)
            for other in (DRIVER, WORKER)
            for port in (6379, 10002, 41234)
        ),
        (SUBMITTER, DRIVER, 8265),
        (DRIVER, MLFLOW, 5000),
    ],
)
def test_what_a_run_needs_connects(source: dict[str, str], to: dict[str, str], port: int) -> None:
    assert connects(source, to, port)


def test_the_operator_reaches_the_job_server_wherever_it_runs() -> None:
    assert connects(OPERATOR, DRIVER, 8265)
    assert connects(OPERATOR, DRIVER, 8265, namespace=ELSEWHERE)
    # A name is answered for all.
    assert all(passes("Egress", one, OTHER, ELSEWHERE, 53) for one in (DRIVER, WORKER, SUBMITTER))
    # The driver downloads; its autoscaler asks the API server.
    assert passes("Egress", DRIVER, OTHER, ELSEWHERE, 443)


@pytest.mark.parametrize("namespace", [OURS, ELSEWHERE])
@pytest.mark.parametrize("to", [DRIVER, WORKER, SUBMITTER, MLFLOW, FILES])
@pytest.mark.parametrize("port", [22, 5000, 6379, 8265, 10001])
def test_no_other_pod_connects(to: dict[str, str], port: int, namespace: str) -> None:
    assert not connects(OTHER, to, port, namespace)


@pytest.mark.parametrize(
    ("source", "to", "port"),
    [
        *((one, MLFLOW, 5000) for one in (WORKER, SUBMITTER, FILES, OPERATOR)),
        *((OPERATOR, DRIVER, port) for port in (6379, 10001)),
        (OPERATOR, WORKER, 8265),
        (SUBMITTER, DRIVER, 6379),
        (SUBMITTER, WORKER, 8265),
        (WORKER, OTHER, 443),
        (SUBMITTER, OTHER, 443),
        (MLFLOW, OTHER, 443),
        (MLFLOW, DRIVER, 6379),
        (FILES, OTHER, 443),
    ],
)
def test_none_connects_where_it_has_no_work(source: dict[str, str], to: dict[str, str], port: int) -> None:
    assert not connects(source, to, port)
