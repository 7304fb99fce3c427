"""What stands between a user and a run: everything that one needs, looked at thing by thing, with nothing left behind.

What fails is found and told, and the next is looked at: nothing is raised.
"""

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import actors
import slimllm_ops
from cluster import ClusterError, Resources, WorkerPlan, plan_workers
from cluster.session import session
from orchestrator.config import PruneConfig
from orchestrator.data.files import local_file
from orchestrator.inputs import DOWNLOADED, model_name, resolve_model
from orchestrator.output.staging import require_startable
from orchestrator.pipeline import tracking_options
from orchestrator.preflight.checks import Check, Nodes, check_disks, check_memory, check_nodes, existing, look_at
from orchestrator.preflight.dry_run import checkpoints_output
from orchestrator.preflight.estimate import Estimate, Text, Workload, estimate_pruning, readable
from orchestrator.record.files import PACKAGES
from orchestrator.secrets import masked
from orchestrator.sources import hub
from orchestrator.sources.storage import is_uri
from orchestrator.tracking.reach import reach_store
from orchestrator.version import VERSION
from slimllm_ops.checkpoint.reading import Checkpoint

# Stands for the cluster where there is none.
ALONE = WorkerPlan(1, 1, 0.0, weights_travel=False)


def diagnose(config: PruneConfig) -> Iterator[Check]:
    """Yield what was found, for runs of a config; without a model, of what all runs need."""
    yield from _looked("versions", check_versions)
    source = None
    if config.model is not None:
        found, check = find_model(config.model)
        yield check
        source = found
    yield from _check_cluster(config, source)
    yield from _looked("tracking", lambda: check_tracking(config))
    yield from _looked("hub", lambda: check_hub(config, found=source is not None))
    if source is not None:
        yield from _looked("output", lambda: check_output(config))


def check_versions() -> Check:
    """Say which versions are here, and which do not fit."""
    packages = {"slimllm": VERSION} | {name: _version(name) for name in PACKAGES}
    found = f"Python {platform.python_version()}, " + ", ".join(f"{name} {one}" for name, one in packages.items())
    wanted = [Requirement(line) for line in requires("slimllm") or ()]
    wrong = [
        f"{one.name}{one.specifier}"
        for one in wanted
        if (one.marker is None or one.marker.evaluate({"extra": ""}))
        and not one.specifier.contains(_version(one.name), prereleases=True)
    ]
    return Check("versions", not wrong, found, f"install {', '.join(wrong)}" if wrong else "")


def find_model(model: str) -> tuple[Checkpoint | None, Check]:
    """Open a model if it is on this machine; say what there is to know of it. Nothing is downloaded."""
    try:
        if is_uri(model):
            return None, Check(
                "model", True, f"{masked(model)} is fetched by the first run; what it needs is known then"
            )
        if _is_hub_id(model):
            directory = hub.find_model(model, DOWNLOADED)
            if directory is None:
                size = readable(hub.size_of_model(model, DOWNLOADED))
                found = f"{model} is on the hub and not here yet: {size}, which the first run downloads"
                return None, Check("model", True, f"{found}; what a run needs is known then")
        else:
            directory = resolve_model(model)
        source = Checkpoint.open(directory)
    # Any: a directory of someone else's may hold anything.
    except Exception as error:
        return None, Check("model", False, _told(error), "" if isinstance(error, ValueError) else "check the name")
    shape = f"{source.config.model_type}, {source.num_layers} layers of hidden size {source.config.hidden_size}"
    return source, Check("model", True, f"{directory}: {shape}, {readable(source.num_bytes())}")


def check_tracking(config: PruneConfig) -> Check:
    """Ask where runs are to be logged; a run goes on without it, and what it missed can be logged later."""
    return Check("tracking", True, reach_store(tracking_options(config)))


def check_hub(config: PruneConfig, *, found: bool) -> Check:
    """Ask the hub, where something is to come from there.

    Args:
        config: what is asked.
        found: whether the model is on this machine.
    """
    specs = [spec for spec in (config.calibration, *config.evaluate) if spec is not None]
    # What is in a store is not fetched to see whether it is there.
    named = [spec for spec in specs if not spec.startswith("builtin:") and not is_uri(spec)]
    needed = [spec for spec in named if local_file(spec) is None]
    if config.model is not None and not found and _is_hub_id(config.model):
        needed.append(config.model)
    try:
        return Check("hub", True, f"{hub.reach_hub()} answers")
    except hub.HubError as error:
        if not needed:
            return Check("hub", True, f"not needed: what was named is on this machine ({error})")
        remedy = f"mend the network, or give paths in the place of {', '.join(needed)}"
        return Check("hub", False, str(error), remedy)


def check_output(config: PruneConfig) -> Check:
    """Say whether the output is free, or what is there can be gone on with."""
    output = _output(config)
    require_startable(output, config.overwrite, None, config.resume)
    return Check("output", True, f"{output} is free")


def _check_cluster(config: PruneConfig, source: Checkpoint | None) -> Iterator[Check]:
    """Yield what was found of Ray and its nodes, and whether a run of the model fits there."""
    try:
        with session(config.address, (actors, slimllm_ops)) as resources:
            sizes = f"{len(resources.nodes)} node(s) with {resources.cpus} CPUs and {resources.gpus} GPUs"
            where = f"at {config.address}" if config.address else "of this machine"
            yield Check("Ray", True, f"{version('ray')} {where}, {sizes}")
            yield from _check_nodes(config, source, resources)
            return
    # Any: whatever starts a Ray, or is asked for one, may fail.
    except Exception as error:
        yield Check("Ray", False, _told(error), "" if isinstance(error, ClusterError) else "look at its logs")
    if source is not None:
        estimate = _estimate(config, source, replace(ALONE, num_workers=config.workers or 1), None)
        yield from check_disks(config, _output(config), estimate, Nodes(Resources(()), ()), ALONE)


def _check_nodes(config: PruneConfig, source: Checkpoint | None, resources: Resources) -> Iterator[Check]:
    try:
        workers = plan_workers(resources, config.workers, config.gpus_per_worker, config.shared_storage)
    except ClusterError as error:
        yield Check("workers", False, str(error))
        workers = ALONE
    nodes = look_at(resources, workers, "cuda" if workers.gpus_per_worker else "cpu")
    yield from check_nodes(nodes, workers)
    if source is None:
        place = existing(_output(config) if config.output else Path())
        yield Check("disk", True, f"{readable(shutil.disk_usage(place).free)} free in {place}")
        return
    estimate = _estimate(config, source, workers, nodes)
    yield Check("estimate", True, "; ".join(estimate.lines()))
    yield from check_memory(estimate, nodes, workers)
    yield from check_disks(config, _output(config), estimate, nodes, workers)


def _estimate(config: PruneConfig, source: Checkpoint, workers: WorkerPlan, nodes: Nodes | None) -> Estimate:
    """Return what a run of as much text as is asked for will take; a text may turn out to be shorter."""
    length = min(config.sequence_length, source.config.max_position_embeddings)
    text = Text(config.samples, length)
    held_out = (text,) * (len(config.evaluate) or (config.calibration is None and config.moments is None))
    rates = None if nodes is None else nodes.rates
    return estimate_pruning(Workload.described(config, source, text, held_out, workers, rates))


def _looked(name: str, look: Callable[[], Check]) -> Iterator[Check]:
    """Yield what a look gives, or what it failed by."""
    try:
        yield look()
    # Any: a doctor that stumbles over one thing still looks at the others.
    except Exception as error:
        yield Check(name, False, _told(error))


def _output(config: PruneConfig) -> Path:
    """Return where a run would write on this machine."""
    return checkpoints_output(config, model_name(config.model)).directory


def _is_hub_id(model: str) -> bool:
    is_path = model.startswith((".", "/", "~")) or Path(model).exists()
    return not is_path and not is_uri(model) and model.count("/") == 1


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # Those of this program, whose text says what to do, are values that are wrong.
    known = isinstance(error, ValueError | hub.HubError)
    return masked(lines[0] if lines and known else f"{type(error).__name__}: {lines[0] if lines else ''}")[:400]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"
