"""The manifests satisfy the API server's schema, and match one another and the placement of workers."""

import copy
import os
import re
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import jsonschema
import kubernetes_validate
import psutil
import pytest
from mlflow.cli import server
from mlflow.server.security_utils import is_allowed_host_header

from cluster import Node, Resources, plan_workers
from tests.cluster.deploy.commands import IMAGE, pinned, schema, settings_of
from tests.cluster.deploy.manifests import AUTOSCALER_TOKEN, OBJECTS, Object, of_kind, pods_of, ray_clusters

KUBERNETES = "1.32"
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str | int) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * UNITS[unit]


def check(one: Object) -> None:
    """Raise where the API server would refuse an object, or drop a part of it."""
    if one["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        return
    job = schema()
    described = job if one["kind"] == "RayJob" else copy.deepcopy(job)
    if one["kind"] == "RayCluster":
        described["properties"]["spec"] = described["properties"]["spec"]["properties"]["rayClusterSpec"]
    jsonschema.validate(one, described)
    for pod in pods_of(one):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_the_api_server_takes_every_object_whole(one: Object) -> None:
    check(one)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "backoffLimits", 3),
        ((), "ttlSecondsAfterFinished", "soon"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "minReplica", 1),
        (("rayClusterSpec", "autoscalerOptions"), "version", "v3"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "imagePullPolice", "Always"),
    ],
)
def test_what_the_api_server_would_not_take_is_found(path: tuple[str | int, ...], key: str, value: object) -> None:
    job = copy.deepcopy(of_kind("RayJob"))
    place = job["spec"]
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=key):
        check(job)


def test_every_claim_service_volume_and_image_that_is_named_is_there() -> None:
    claims = {one["metadata"]["name"] for one in OBJECTS if one["kind"] == "PersistentVolumeClaim"}
    for pod in (pod for one in OBJECTS for pod in pods_of(one)):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        claimed = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
        assert {claim["claimName"] for claim in claimed} <= claims
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == set(volumes) - {AUTOSCALER_TOKEN}
    service = of_kind("Service")
    served = of_kind("Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= served["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] in [p["name"] for p in served["spec"]["containers"][0]["ports"]]


@pytest.mark.parametrize("spec", ray_clusters(), ids=["RayCluster", "RayJob"])
def test_what_kuberay_refuses_beyond_its_schema(spec: Object) -> None:
    """Its operator's own rules: of `ValidateRayClusterSpec` and `ValidateRayJobSpec`."""
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # Version 2 of the autoscaler sets what a pod does when it ends.
    assert all("restartPolicy" not in pod for pod in pods_of({"kind": "RayCluster", "spec": spec}))
    job = of_kind("RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert len(job["metadata"]["name"]) <= 47


@pytest.mark.parametrize("spec", ray_clusters(), ids=["RayCluster", "RayJob"])
def test_a_worker_is_placed_on_each_gpu_with_all_cpus_that_fall_to_it(spec: Object) -> None:
    parameters = spec["headGroupSpec"]["rayStartParams"]
    nodes = [Node(int(parameters["num-cpus"]), int(parameters["num-gpus"]))]
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        nodes += [Node(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))] * group["minReplicas"]
    plan = plan_workers(Resources(tuple(nodes), local=False), None, None)
    (_, first, *_) = nodes
    assert (plan.num_workers, plan.gpus_per_worker) == (sum(node.gpus for node in nodes), 1.0)
    assert plan.cpus_per_worker == first.cpus // first.gpus


@pytest.mark.parametrize("spec", ray_clusters(), ids=["RayCluster", "RayJob"])
def test_rays_object_store_fits_its_memory_and_that_the_pods(spec: Object) -> None:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        memory = quantity(container["resources"]["limits"]["memory"])
        assert store <= quantity(volume["emptyDir"]["sizeLimit"]) <= memory / 2
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_jobs_cluster_is_the_one_that_stays_but_for_how_far_it_grows() -> None:
    stays, jobs = map(copy.deepcopy, ray_clusters())
    for spec in (stays, jobs):
        for group in spec["workerGroupSpecs"]:
            del group["maxReplicas"]
    assert stays == jobs


def test_the_job_writes_where_the_volume_is_and_goes_on_when_it_is_tried_again() -> None:
    job = of_kind("RayJob")["spec"]
    config = settings_of(pruning(job["entrypoint"]))
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = [mount["mountPath"] for mount in head["volumeMounts"] if mount["name"] == "data"]
    assert config.output.startswith(f"{mount}/")
    assert {one["name"]: one["value"] for one in head["env"]}["HF_HOME"].startswith(f"{mount}/")
    assert config.resume
    # The driver runs in the head's pod, and the workers have no such volume.
    assert not config.shared_storage
    assert config.address is None


def pruning(entrypoint: str) -> str:
    """The command that an entrypoint repeats."""
    words = shlex.split(entrypoint)
    return shlex.join(words[words.index("slimllm") :])


# `ray job submit` gives the job's server its words, quoted for a shell.
RAY = """#!/bin/sh
shift 3; exec python3 -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$@"
"""
# Ends with the first code that is left, and notes its words; `wait` stands for a run that SIGTERM ends.
SLIMLLM = """#!/bin/bash
echo "$@" >>told; code=$(head -1 codes); sed -i 1d codes
if [ "$code" = wait ]; then trap 'sleep .2; touch cleaned; exit 143' TERM; touch begun; while :; do sleep .02; done; fi
exit $code
"""


@pytest.fixture(params=["K8sJobMode", "HTTPMode"])
def entrypoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command that Ray runs when KubeRay submits the job, with stand-ins for slimllm and for a pause."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ray", RAY), ("slimllm", SLIMLLM), ("sleep", "#!/bin/bash\nread -t .01 </dev/zero\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    command = of_kind("RayJob")["spec"]["entrypoint"]
    if request.param == "HTTPMode":
        return command
    submitter = ["bash", "-ce", f"ray job submit -- {command} ;"]
    return subprocess.run(submitter, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("codes", "attempts", "code"),
    [
        ("0", 1, 0),
        ("2 0", 1, 2),
        ("143 0", 1, 143),
        ("130 0", 1, 130),
        ("1 2 0", 2, 2),
        ("1 137 0", 3, 0),
        ("1 1 1 1 0", 4, 1),
    ],
)
def test_a_refusal_is_not_tried_again_and_a_failure_is(
    entrypoint: str, tmp_path: Path, codes: str, attempts: int, code: int
) -> None:
    assert of_kind("RayJob")["spec"]["backoffLimit"] == 0, "KubeRay would try a refusal again"
    (tmp_path / "codes").write_text(codes.replace(" ", "\n"))
    assert subprocess.run(entrypoint, shell=True, cwd=tmp_path, check=False, timeout=60).returncode == code
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [shlex.join(shlex.split(pruning(entrypoint))[1:])] * attempts


def test_a_run_that_is_told_to_end_has_time_to_and_is_not_tried_again(entrypoint: str, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("1\nwait\n0")
    job = subprocess.Popen(entrypoint, shell=True, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # As Ray does: every process of the job.
    for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    assert job.wait(timeout=60) in (143, -signal.SIGTERM)
    while not (tmp_path / "cleaned").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len((tmp_path / "told").read_text().splitlines()) == 2


def test_a_command_with_an_option_that_is_none_is_found() -> None:
    command = pruning(of_kind("RayJob")["spec"]["entrypoint"])
    with pytest.raises(Exception, match="No such option '--sparsities'"):
        settings_of(command.replace("--sparsity", "--sparsities"))


def test_mlflow_listens_where_the_drivers_look_and_takes_them_for_its_own() -> None:
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    program, command, *arguments = container["args"]
    assert (program, command) == ("mlflow", "server")
    settings = server.make_context("server", arguments).params
    port = of_kind("Service")["spec"]["ports"][0]["port"]
    assert settings["port"] == port == container["ports"][0]["containerPort"]
    (mount,) = container["volumeMounts"]
    assert settings["backend_store_uri"].startswith(f"sqlite:///{mount['mountPath']}/")
    assert settings["artifacts_destination"].startswith(f"{mount['mountPath']}/")
    assert settings["serve_artifacts"]
    hosts = settings["allowed_hosts"].split(",")
    name = of_kind("Service")["metadata"]["name"]
    for spec in ray_clusters():
        environment = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        assert {"name": "MLFLOW_TRACKING_URI", "value": f"http://{name}:{port}"} in environment
    for host in (f"{name}:{port}", f"{name}.default.svc.cluster.local:{port}", "localhost:5000", "127.0.0.1:8080"):
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "elsewhere.example.com")
