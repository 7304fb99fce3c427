"""Checks everything that a run needs, one thing after the other, and leaves nothing behind.

A failed check is reported, and the next one runs: nothing is raised.
"""

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from cluster import ClusterError, Resources, WorkerPlan
from cluster.authentication import others_can_read, token_file
from cluster.ray_private import asks_for_token
from orchestrator.config import PruneConfig
from orchestrator.data.files import local_file
from orchestrator.inputs import model_name
from orchestrator.output.destination import checkpoints_output
from orchestrator.output.staging import require_can_start
from orchestrator.pipeline import tracking_options
from orchestrator.preflight.checks import (
    Check,
    Nodes,
    check_disks,
    check_memory,
    check_nodes,
    inspect_cluster,
    nearest_directory,
)
from orchestrator.preflight.commands import estimate_pruning
from orchestrator.preflight.estimate import Estimate, readable
from orchestrator.preflight.workload import Text, Workload
from orchestrator.pruning.backends import Backend, backend_of
from orchestrator.record.params import PACKAGES
from orchestrator.secrets import masked
from orchestrator.sources import hub
from orchestrator.sources.models import DOWNLOADED, is_hub_id, resolve_model
from orchestrator.sources.storage import is_uri
from orchestrator.tracking.reach import reach_store
from orchestrator.version import DISTRIBUTION, VERSION
from slimllm_ops.checkpoint.reading import Checkpoint

# The workers to assume if there is no cluster.
ALONE = WorkerPlan(1, 1, 0.0, weights_travel=False)


def diagnose(config: PruneConfig) -> Iterator[Check]:
    """Yield the checks for a run of a config; without a model, the checks that all runs need."""
    yield from _run_check("versions", check_versions)
    source = None
    if config.model is not None:
        found, check = find_model(config.model, config.revision)
        yield check
        source = found
    yield from _check_cluster(config, source)
    yield from _run_check("tracking", lambda: check_tracking(config))
    yield from _run_check("hub", lambda: check_hub(config, found=source is not None))
    if source is not None:
        yield from _run_check("output", lambda: check_output(config))


def check_versions() -> Check:
    """Check the installed versions, and name those that do not fit.

    A Ray job carries the code without installing it. Then nothing says which versions fit, and the check passes.
    """
    packages = {"slimllm": VERSION} | {name: _version(name) for name in PACKAGES}
    found = f"Python {platform.python_version()}, " + ", ".join(f"{name} {one}" for name, one in packages.items())
    try:
        wanted = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return Check("versions", True, f"{found}; {DISTRIBUTION} is not installed, so nothing says which versions fit")
    wrong = [
        f"{one.name}{one.specifier}"
        for one in wanted
        if (one.marker is None or one.marker.evaluate({"extra": ""}))
        and not one.specifier.contains(_version(one.name), prereleases=True)
    ]
    return Check("versions", not wrong, found, f"install {', '.join(wrong)}" if wrong else "")


def find_model(model: str, revision: str | None = None) -> tuple[Checkpoint | None, Check]:
    """Open a model if it is on this machine, and describe it; download nothing."""
    try:
        if is_uri(model):
            return None, Check(
                "model", True, f"{masked(model)} is fetched by the first run, which then estimates what it needs"
            )
        if is_hub_id(model):
            directory = hub.find_model(model, DOWNLOADED, revision)
            if directory is None:
                size = readable(hub.size_of_model(model, DOWNLOADED, revision))
                found = f"{model} is on the hub and not here yet: the first run downloads {size}"
                return None, Check("model", True, f"{found}, then estimates what it needs")
        else:
            directory = resolve_model(model, revision).directory
        source = Checkpoint.open(directory)
    # Any exception: the directory may contain anything.
    except Exception as error:
        return None, Check(
            "model", False, _error_text(error), "" if isinstance(error, ValueError) else "check the name"
        )
    shape = f"{source.config.model_type}, {source.num_layers} layers of hidden size {source.config.hidden_size}"
    found = "; ".join([f"{directory}: {shape}, {readable(source.num_bytes())}", *source.warnings])
    return source, Check("model", True, found)


def check_tracking(config: PruneConfig) -> Check:
    """Check that MLflow can be reached; a run goes on without it, and can be logged later."""
    return Check("tracking", True, reach_store(tracking_options(config)))


def check_hub(config: PruneConfig, *, found: bool) -> Check:
    """Check that the hub answers, if something must come from it.

    Args:
        config: The run's settings.
        found: Whether the model is on this machine.
    """
    specs = [spec for spec in (config.calibration, *config.evaluate) if spec is not None]
    # Files in a store are not checked: that would mean fetching them.
    named = [spec for spec in specs if not spec.startswith("builtin:") and not is_uri(spec)]
    needed = [spec for spec in named if local_file(spec) is None]
    if config.model is not None and not found and is_hub_id(config.model):
        needed.append(config.model)
    try:
        return Check("hub", True, f"{hub.reach_hub()} answers")
    except hub.HubError as error:
        if not needed:
            return Check("hub", True, f"not needed: everything named is on this machine ({error})")
        remedy = f"repair the network, or give paths in place of {', '.join(needed)}"
        return Check("hub", False, str(error), remedy)


def check_authentication(config: PruneConfig) -> Check:
    """Check that the connected Ray asks for a token, and that nobody else can read the user's; a run goes on without.

    A Ray that a run starts has its own token (cluster/local_ray.py). The user's is for other clusters.
    """
    if (path := token_file()) is not None and others_can_read(path):
        return Check(
            "authentication",
            False,
            f"others can read {path}, and whoever has the token runs code on your clusters",
            f"make a new token that only you can read: rm {path}; umask 077; ray get-auth-token --generate",
        )
    if asks_for_token():
        return Check("authentication", True, "Ray asks for a token")
    place = config.address or "this address"
    return Check(
        "authentication",
        True,
        f"off: whoever can reach the Ray at {place} runs code there; start it with RAY_AUTH_MODE=token, or keep others "
        f"out of its network",
    )


def check_output(config: PruneConfig) -> Check:
    """Check that the output is free, or that the run can overwrite or resume it."""
    output = _output(config)
    require_can_start(output, config.overwrite, None, config.resume)
    return Check("output", True, f"{output} is free")


def _check_cluster(config: PruneConfig, source: Checkpoint | None) -> Iterator[Check]:
    """Check Ray and its nodes, and whether a run of the model fits there."""
    backend = backend_of(config)
    try:
        with backend.session() as resources:
            sizes = f"{len(resources.nodes)} node(s) with {resources.cpus} CPUs and {resources.gpus} GPUs"
            where = f"at {config.address}" if config.address else "of this machine"
            yield Check("Ray", True, f"{_version('ray')} {where}, {sizes}")
            if not config.local:
                yield from _run_check("authentication", lambda: check_authentication(config))
            yield from _check_nodes(config, backend, source, resources)
            return
    # Any exception: starting or joining Ray can fail in many ways.
    except Exception as error:
        yield Check("Ray", False, _error_text(error), "" if isinstance(error, ClusterError) else "look at its logs")
    if source is not None:
        estimate = _estimate(config, source, replace(ALONE, num_workers=config.workers or 1))
        yield from check_disks(config, _output(config), estimate, Nodes(Resources(()), ()), ALONE)


def _check_nodes(
    config: PruneConfig, backend: Backend, source: Checkpoint | None, resources: Resources
) -> Iterator[Check]:
    try:
        workers = backend.plan_workers(resources)
    except ClusterError as error:
        yield Check("workers", False, str(error))
        workers = ALONE
    nodes = inspect_cluster(resources, workers.gpus_per_worker)
    yield from check_nodes(nodes, workers)
    if source is None:
        place = nearest_directory(_output(config) if config.output else Path())
        yield Check("disk", True, f"{readable(shutil.disk_usage(place).free)} free in {place}")
        return
    estimate = _estimate(config, source, workers)
    yield Check("estimate", True, estimate.describe())
    yield from check_memory(estimate, nodes, workers)
    yield from check_disks(config, _output(config), estimate, nodes, workers)


def _estimate(config: PruneConfig, source: Checkpoint, workers: WorkerPlan) -> Estimate:
    """Estimate a run on as much text as the config asks for; the real texts may have other lengths."""
    length = min(config.sequence_length, source.config.max_position_embeddings)
    text = Text(config.samples, length)
    evaluated = text if config.evaluate_tokens is None else Text(max(1, config.evaluate_tokens // length), length)
    held_out = (evaluated,) * (len(config.evaluate) or (config.calibration is None and config.moments is None))
    return estimate_pruning(Workload.of_texts(config, source, text, held_out, workers))


def _run_check(name: str, look: Callable[[], Check]) -> Iterator[Check]:
    """Yield a check's result, or a failed check with its error."""
    try:
        yield look()
    # Any exception: the other checks must still run.
    except Exception as error:
        yield Check(name, False, _error_text(error))


def _output(config: PruneConfig) -> Path:
    """Return the directory that a run would write on this machine."""
    return checkpoints_output(config, model_name(config.model)).directory


def _error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # This program's own errors, which say what to do, are ValueErrors or HubErrors.
    known = isinstance(error, ValueError | hub.HubError)
    return masked(lines[0] if lines and known else f"{type(error).__name__}: {lines[0] if lines else ''}")[:400]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"
