"""Kills workers, nodes, heads and drivers at random moments, and compares the results: `python -m benchmarks.faults`.

Each case is a whole run of the command line in its own processes. It is disturbed once, at a moment drawn from a seed:
a fraction of a second after a number of files is solved. If the run cannot survive that, it is resumed. Then every
file of its output is compared with an undisturbed run's.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import psutil
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from benchmarks.machine import describe_machine, write_table
from benchmarks.random_model import Shape, write_model
from benchmarks.random_tokens import write_tokens
from cluster.local_ray import private_folder, private_settings
from cluster.sockets import SUBFOLDER

SHAPE = Shape(hidden=64, intermediate=160, layers=6, heads=4, kv_heads=2, vocabulary=256)
METHODS = {
    "slimllm": ("--sparsity", "0.2"),
    "gram": ("--method", "gram", "--sparsity", "0.2", "--sparsity", "0.4"),
    "refine": ("--method", "gram", "--refine", "--sparsity", "0.3"),
}
# How many of fifty cases each kind gets.
KINDS = {"worker": 26, "node": 5, "driver": 16, "head": 3}
NODES, CPUS_PER_NODE = 3, 2
LAST_SECONDS = 900.0
# Processes that a driver started must end within this time after it.
LEFT_SECONDS = 30.0
# Nobody reads Ray's metrics here, and they take most of a core on a cluster that has lost a node.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


@dataclass(frozen=True)
class Case:
    """A case: a run's method, the process to kill, and the moment, a fraction of the solved files plus a delay."""

    kind: str
    method: str
    fraction: float
    delay: float

    @property
    def on_cluster(self) -> bool:
        """Whether the run is on a cluster; the others are on one machine."""
        return self.kind in ("node", "head")


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    case: Case
    killed: str
    resumed: bool
    seconds: float
    differing: list[str]
    problems: list[str]


@click.command()
@click.option("--cases", type=int, default=50)
@click.option("--seed", type=int, default=0)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Kind of case; repeatable. [all]")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Method; repeatable. [all]")
@click.option("--layers", default=SHAPE.layers, help="Layers of the model, whose hidden size is 64.")
@click.option("--output", type=Path, default=Path("benchmarks/results/faults.md"))
def main(cases: int, seed: int, kinds: tuple[str, ...], methods: tuple[str, ...], layers: int, output: Path) -> None:
    """Run the campaign and write its table; the exit code is 1 if anything differs."""
    os.environ.update(ENVIRONMENT)
    outcomes = []
    # The clusters and the commands have one token, and listen on this machine alone.
    with tempfile.TemporaryDirectory() as folder, private_folder() as private, private_settings(private):
        bench = Bench(Path(folder), private / SUBFOLDER, replace(SHAPE, layers=layers))
        for case in draw_cases(cases, seed, kinds or tuple(KINDS), methods or tuple(METHODS)):
            outcomes.append(bench.run(case, len(outcomes) + 1))
            print(*_cells(len(outcomes), outcomes[-1]), sep=" | ", flush=True)
            header = ["case", "method", "killed", "when", "resumed", "seconds", "differing files", "other problems"]
            rows = [header, *(_cells(number, outcome) for number, outcome in enumerate(outcomes, start=1))]
            equal = sum(not outcome.differing and not outcome.problems for outcome in outcomes)
            title = f"{equal} of {len(outcomes)} disturbed runs end as the undisturbed one does (seed {seed})"
            write_table(output, title, describe_machine(), rows)
    sys.exit(equal < len(outcomes))


def draw_cases(count: int, seed: int, kinds: Sequence[str], methods: Sequence[str]) -> list[Case]:
    """Draw cases: kinds in their proportions, methods in turn, moments at random."""
    generator = random.Random(seed)
    shares = {kind: KINDS[kind] / sum(KINDS[one] for one in kinds) for kind in kinds}
    drawn = [kind for kind, share in shares.items() for _ in range(round(share * count))]
    return [
        Case(kind, methods[number % len(methods)], generator.random(), generator.uniform(0, 0.5))
        for number, kind in enumerate(drawn)
    ]


@dataclass(frozen=True)
class Attempt:
    """A run of the command line, with its log and its output."""

    process: "subprocess.Popen[bytes]"
    log: Path
    output: Path

    def solved_files(self) -> int:
        """Return the number of files that the run has solved."""
        solved = self.output.with_name(f".{self.output.name}.partial") / ".work" / "solved"
        return sum(path.is_file() and path.suffix != ".partial" for path in solved.rglob("*"))

    def reaches(self, num_files: int, delay: float) -> bool:
        """Wait until the run has solved this many files, then for the delay; return whether it still runs."""
        while self.process.poll() is None and self.solved_files() < num_files:
            time.sleep(0.01)
        time.sleep(delay)
        return self.process.poll() is None

    def family(self, title: str = "") -> list[psutil.Process]:
        """Return the run's child processes whose title starts with this."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if one.is_running() and " ".join(one.cmdline()).startswith(title)]

    def end(self) -> tuple[int, str]:
        """Wait for the run to end; return its exit code and its log."""
        try:
            self.process.wait(timeout=LAST_SECONDS)
        except subprocess.TimeoutExpired:
            for one in (*self.family(), self.process):
                one.kill()
            self.process.wait()
        return self.process.returncode, self.log.read_text()


class Bench:
    """A folder with a model, data, a tracking store, and the outputs of undisturbed runs."""

    def __init__(self, folder: Path, ray_folder: Path, shape: Shape) -> None:
        self._folder, self._ray_folder, self._shape = folder, ray_folder, shape
        write_model(folder / "model", shape)
        for name, blocks in (("calibration", 64), ("held-out", 16)):
            write_tokens(folder / f"{name}.parquet", blocks, 64, shape.vocabulary)
        self._store = f"sqlite:///{folder}/mlflow.db"
        # By method and place: a cluster has more workers, so its sums differ.
        self._undisturbed: dict[tuple[str, bool], tuple[dict[str, bytes], int]] = {}

    def run(self, case: Case, number: int) -> Outcome:
        """Disturb a run, resume it if it wrote no output, and compare."""
        expected, num_files = self._expected(case)
        start, output = time.monotonic(), self._folder / f"case-{number}" / "out"
        with self._begun(case, output) as (attempt, cluster):
            reached = attempt.reaches(max(1, round(case.fraction * num_files)), case.delay)
            killed, problems = KILLS[case.kind](attempt, cluster) if reached else ("nothing: it had ended", [])
            code, said = attempt.end()
        if resumed := not output.exists():
            with self._begun(case, output, "--resume") as (attempt, _):
                code, said = attempt.end()
        problems += [f"exit code {code}: {said[-500:]}"] if code else []
        problems += ["a traceback"] if "Traceback" in said else []
        problems += self._wrong_record(output.parent.name)
        problems += [f"{path.name} is left behind" for path in output.parent.iterdir() if path != output]
        found = content(output)
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return Outcome(case, killed, resumed, time.monotonic() - start, differing, problems)

    def _expected(self, case: Case) -> tuple[dict[str, bytes], int]:
        """Return the output of an undisturbed run, and the number of files that it solved."""
        key = (case.method, case.on_cluster)
        if key not in self._undisturbed:
            output, most = self._folder / f"undisturbed-{case.method}-{case.on_cluster}" / "out", 0
            with self._begun(case, output) as (attempt, _):
                while attempt.process.poll() is None:
                    most = max(most, attempt.solved_files())
                    time.sleep(0.02)
                code, said = attempt.end()
            if code:
                raise RuntimeError(f"the undisturbed run of {case.method} ended with {code}: {said}")
            self._undisturbed[key] = content(output), most
        return self._undisturbed[key]

    @contextmanager
    def _begun(self, case: Case, output: Path, *options: str) -> Iterator[tuple[Attempt, Cluster | None]]:
        """Start a run, on its own cluster if the case needs one."""
        cluster = start_cluster(self._ray_folder) if case.on_cluster else None
        place = ("--address", cluster.address, "--workers", str(NODES)) if cluster else ("--workers", "2")
        arguments = [
            *("prune", str(self._folder / "model"), *METHODS[case.method]),
            *("--calibration", str(self._folder / "calibration.parquet")),
            *("--evaluate", str(self._folder / "held-out.parquet"), "--output", str(output)),
            *("--run-name", output.parent.name, "--tracking-uri", self._store, *place, *options),
        ]
        output.parent.mkdir(exist_ok=True)
        log = self._folder / f"{output.parent.name}.log"
        with log.open("a") as file:
            command = [sys.executable, "-P", "-m", "orchestrator", *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            yield Attempt(process, log, output), cluster
        finally:
            process.kill()
            if cluster is not None:
                cluster.shutdown()

    def _wrong_record(self, name: str) -> list[str]:
        """Return what is wrong with a run in MLflow: it must exist once, with one point for each layer."""
        client = MlflowClient(self._store)
        experiment = client.get_experiment_by_name("slimllm")
        runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        problems = [] if len(runs) == 1 else [f"{len(runs)} runs in MLflow"]
        for run in runs:
            children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
            for one in children or [run]:
                steps = [metric.step for metric in client.get_metric_history(one.info.run_id, "channels_kept")]
                if sorted(steps) != list(range(self._shape.layers)) or one.info.status != "FINISHED":
                    problems.append(f"layers {steps} in MLflow, {one.info.status}")
        return problems


def kill_worker(attempt: Attempt, cluster: Cluster | None) -> tuple[str, list[str]]:
    """Kill a worker of the local Ray: one that solves, or else one that holds a shard."""
    shards = attempt.family("ray::Shard") or attempt.family("ray::")
    solves = [one for title in ("ray::eliminate", "ray::decide", "ray::rank") for one in attempt.family(title)]
    one = (solves + shards)[0]
    title = one.cmdline()[0].removeprefix("ray::")
    one.kill()
    return f"worker ({title})", []


def kill_driver(attempt: Attempt, cluster: Cluster | None) -> tuple[str, list[str]]:
    """Kill the command's own process; the processes that it started must end by themselves.

    Ray's agents, which only report on a node, are exempt: they notice after a minute.
    """
    started = [one for one in attempt.family() if "Agent" not in one.name()]
    attempt.process.kill()
    _, alive = psutil.wait_procs(started, timeout=LEFT_SECONDS)
    for one in alive:
        one.kill()
    return "driver", [f"{len(alive)} processes lived on"] if alive else []


def kill_node(attempt: Attempt, cluster: Cluster | None) -> tuple[str, list[str]]:
    """Kill a node other than the driver's, with everything on it."""
    assert cluster is not None
    cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
    return "node", []


def kill_head(attempt: Attempt, cluster: Cluster | None) -> tuple[str, list[str]]:
    """Kill the cluster's head, which is also the driver's node."""
    assert cluster is not None
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    return "head", []


KILLS = {"worker": kill_worker, "driver": kill_driver, "node": kill_node, "head": kill_head}


def start_cluster(folder: Path) -> Cluster:
    """Start a cluster of several nodes on this machine, with its files in a folder."""
    head = {"num_cpus": CPUS_PER_NODE, "include_dashboard": False, "temp_dir": str(folder)}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=CPUS_PER_NODE)
    cluster.wait_for_nodes()
    return cluster


def content(output: Path) -> dict[str, bytes]:
    """Return every file of an output except its journals, which record times."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in ("metrics.jsonl", "report.html")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def _cells(number: int, outcome: Outcome) -> list[str]:
    case = outcome.case
    return [
        *(str(number), case.method, outcome.killed, f"{case.fraction:.0%} solved + {case.delay:.1f} s"),
        *("yes" if outcome.resumed else "no", f"{outcome.seconds:.0f}"),
        *(", ".join(outcome.differing) or "none", ", ".join(outcome.problems) or "none"),
    ]


if __name__ == "__main__":
    main()
