"""Before a run starts, it is refused if it certainly does not fit, and warned about if it might not."""

import json
import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from actors import node_state
from actors.node_state import Gpu, NodeState
from cluster import Node, Resources, WorkerPlan
from orchestrator import pipeline
from orchestrator.cli import main
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.output.staging import open_staging
from orchestrator.preflight import checks
from orchestrator.preflight.checks import Check, Nodes, check_disks, check_memory, check_nodes, refuse_certain_failure
from orchestrator.preflight.estimate import Estimate, Stage
from orchestrator.preflight.stages import LIBRARIES

Usage = namedtuple("Usage", "total used free")
WORKERS = WorkerPlan(4, 2, 0.0, weights_travel=False)
ESTIMATE = Estimate(
    stages=(
        Stage(name="start", driver=500 * 10**6),
        Stage(name="pruning", worker=10**9 + LIBRARIES, required=2 * 10**9, driver=600 * 10**6),
    ),
    num_workers=4,
    device="cpu",
    shared=0,
    output=10**9,
    beside=2 * 10**9,
    tracked=10**9,
    spilled=0,
    weights=0,
    moments=0,
    tokens=0,
)


def state(**changes: Any) -> NodeState:
    packages = {"python": node_state.platform.python_version()} | node_state.installed_versions()
    found = NodeState("there", packages, 64 * 10**9, "/tmp", 10**12, None)
    return replace(found, **changes)


def nodes_of(*states: NodeState | str, gpus: int = 0) -> Nodes:
    return Nodes(Resources(tuple(Node(4, gpus, f"id{i}", "10.0.0.1") for i in range(len(states)))), states)


@pytest.mark.parametrize(
    ("free", "ok", "certain"),
    # Two workers a node: they take 2.7 GB, and refuse to begin with less than 4.7.
    [(5.0, True, False), (4.2, False, False), (3.0, False, False), (2.5, False, True)],
)
def test_the_memory_of_every_node_is_compared_with_what_its_workers_need(free: float, ok: bool, certain: bool) -> None:
    short, ample = check_memory(ESTIMATE, nodes_of(state(free_memory=int(free * 1e9)), state()), WORKERS)
    assert (short.ok, short.certain) == (ok, certain)
    assert (ample.ok, ample.certain) == (True, False)
    assert f"of {free:.1f} GB free, for 2 worker(s) of 1.3 GB" in short.found
    assert "--offload" in short.remedy


def test_on_gpus_the_workers_of_one_share_it_and_one_that_was_not_looked_at_is_said() -> None:
    estimate, workers = replace(ESTIMATE, device="cuda"), WorkerPlan(2, 2, 0.5, weights_travel=False)
    seen, unseen = state(gpu=Gpu("H100", 3 * 10**9)), state()
    (check,) = check_memory(estimate, nodes_of(seen, gpus=1), workers)
    assert (check.name, check.ok, check.certain) == ("memory, H100 of there", False, False)
    (check,) = check_memory(estimate, nodes_of(unseen, gpus=1), workers)
    assert check.ok
    assert "not checked" in check.found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("it did not answer in time", "it did not answer in time: check that it is alive"),
        (
            state(packages={"python": "3.10.1"} | node_state.installed_versions()),
            "python 3.10.1: install the same versions as here: python 3.",
        ),
        (state(packages=state().packages | {"torch": ""}), "torch missing: install the same versions as here: torch 2"),
        (state(), "torch sees no GPU: install a torch built for CUDA"),
    ],
)
def test_a_node_that_cannot_work_is_told(found: NodeState | str, said: str) -> None:
    workers = WorkerPlan(1, 2, 1.0, weights_travel=False)
    (check,) = check_nodes(nodes_of(found, gpus=1), workers)
    assert not check.ok
    assert said in f"{check.found}: {check.remedy}"
    (check,) = check_nodes(nodes_of(state()), WORKERS)
    assert check.ok


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the disk have so many GB free."""

    def let(gigabytes: float) -> None:
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(0, 0, int(gigabytes * 1e9)))

    return let


def check_disk(tmp_path: Path, **settings: Any) -> Check:
    settings = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"} | settings
    return check_disks(PruneConfig(**settings), tmp_path / "a" / "out", ESTIMATE, nodes_of(), WORKERS)[0]


def test_the_disk_must_hold_the_output_what_lies_beside_it_and_mlflows_copy(
    tmp_path: Path, disk: Callable[[float], None]
) -> None:
    disk(4.1)
    assert check_disk(tmp_path).ok
    disk(3.9)
    check = check_disk(tmp_path)
    assert (check.ok, check.certain) == (False, False)
    assert "4.0 GB of 3.9 GB free in " in check.found
    # MLflow's copy goes elsewhere.
    assert check_disk(tmp_path, tracking_uri="http://127.0.0.1:1").ok
    disk(2.6)
    assert check_disk(tmp_path).certain


def test_what_an_unfinished_run_has_written_is_not_written_again(tmp_path: Path, disk: Callable[[float], None]) -> None:
    with pytest.raises(KeyboardInterrupt), open_staging(tmp_path / "a" / "out", False, {"a": 1}) as staging:  # noqa: PT012
        with (staging.solved / "layer").open("wb") as file:
            file.truncate(10**9)
        raise KeyboardInterrupt
    disk(2.6)
    assert check_disk(tmp_path).certain
    assert not check_disk(tmp_path, resume=True).certain


def test_spilled_states_must_fit_on_every_nodes_temporary_disk(tmp_path: Path) -> None:
    estimate = replace(ESTIMATE, spilled=10**9)
    nodes = nodes_of(state(free_disk=10**9), state())
    _, short, ample = check_disks(PruneConfig(), tmp_path, estimate, nodes, WORKERS)
    assert (short.ok, short.certain, ample.ok) == (False, True, True)
    assert "2.0 GB of 1.0 GB free in /tmp" in short.found
    assert "TMPDIR" in short.remedy


def test_what_is_certain_is_refused_and_the_rest_is_said() -> None:
    said: list[str] = []
    refuse_certain_failure([Check("a", True, "well"), Check("b", False, "found", "mend")], said.append)
    assert said == ["b: found: mend"]
    with pytest.raises(ConfigError, match=r"^c: found: mend$"):
        refuse_certain_failure([Check("c", False, "found", "mend", certain=True)], said.append)


# ---- In whole runs


Run = Callable[..., Result]


@pytest.fixture
def run(gqa_model: Path, token_file: Path, tmp_path: Path) -> Run:
    """Prune a small model by the command line, in this process."""

    def invoke(*options: str, command: str = "prune", backend: tuple[str, ...] = ("--local",)) -> Result:
        place = ["--output", str(tmp_path / "parent" / "out"), "--calibration", str(token_file)]
        tracking = ["--tracking-uri", "none"] if command in ("prune", "compare") else []
        return CliRunner().invoke(main, [command, str(gqa_model), *place, *backend, *tracking, *options])

    return invoke


@pytest.fixture
def run_on_ray(local_ray: None, run: Run) -> Run:
    """The same on the session's Ray, on one worker."""
    return partial(run, backend=("--workers", "1"))


def test_a_run_tells_its_estimate_before_it_begins(run_on_ray: Run) -> None:
    result = run_on_ray("--verbose")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("layer similarities"))
    assert re.fullmatch(r"estimate: 1 worker\(s\) with \d+ MB of memory, driver .* on the disk", lines[0])
    assert any(line.startswith("estimate, pruning: worker ") for line in lines[1:first])
    # Nothing has been timed yet. Bytes have units that end in B.
    assert not re.search(r"\d s\b|second", "\n".join(lines[:first]))
    assert "left of this stage" in lines[first]


@pytest.mark.parametrize("command", ["prune", "calibrate", "compare"])
def test_a_disk_that_is_too_small_is_refused_with_nothing_left(
    run: Run, token_file: Path, tmp_path: Path, disk: Callable[[float], None], command: str
) -> None:
    disk(1e-5)
    result = run(*(["--evaluate", str(token_file)] if command == "compare" else []), command=command)
    assert result.exit_code == 2, result.output
    assert re.search(r"\nslimllm: disk: .* free in .*: make room there, or choose another --output\n$", result.stderr)
    assert not (tmp_path / "parent").exists()


def test_memory_that_is_too_small_is_refused_and_what_may_be_is_said(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_state, "free_memory", lambda device: 10_000)
    result = run()
    assert result.exit_code == 2, result.output
    assert re.search(r"\nslimllm: memory, .* of 0 MB free, for 1 worker.*: pass --offload, ", result.stderr)
    assert not (tmp_path / "parent").exists()
    # Less than the libraries take, but it may be that others end.
    monkeypatch.setattr(node_state, "free_memory", lambda device: 100_000_000)
    result = run()
    assert result.exit_code == 0, result.output
    assert re.search(r"\nwarning: memory, .* of 100 MB free", result.stderr)


# ---- That only tell


def test_a_dry_run_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/store/mlflow.db"
    for command, told in (("prune", "layer similarities"), ("calibrate", "calibrating")):
        tracking = ("--tracking-uri", store) if command == "prune" else ()
        result = run("--dry-run", *tracking, command=command)
        assert result.exit_code == 0, result.output
        assert f"│ {told}" in result.stdout
        assert f"output: {tmp_path / 'parent' / 'out'}" in result.stdout
        assert not result.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_as_json(run: Run, tmp_path: Path) -> None:
    plan = json.loads(run("--dry-run", "--json", "--method", "gram", "--offload").stdout)
    assert plan["output"] == str(tmp_path / "parent" / "out")
    assert [stage["name"] for stage in plan["estimate"]["stages"]] == [
        *("start", "sensitivities", "calibrating", "deciding", "read back")
    ]
    assert plan["estimate"]["worker"] == max(stage["worker"] for stage in plan["estimate"]["stages"]) > LIBRARIES
    assert "seconds" not in json.dumps(plan)
    assert plan["estimate"]["spilled"] > 0
    assert plan["workers"]["num_workers"] == 1
    assert all(check["ok"] for check in plan["checks"])


def test_a_dry_run_of_what_would_be_refused_shows_the_plan_and_the_refusal(
    run: Run, tmp_path: Path, disk: Callable[[float], None]
) -> None:
    disk(1e-5)
    result = run("--dry-run")
    assert result.exit_code == 2
    assert "│ pruning" in result.stdout
    assert result.stderr.startswith("slimllm: disk: ")
    assert result.stderr.count("\n") == 1
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent" / "out" / "precious").touch()
    result = run("--dry-run")
    assert (result.exit_code, "is not empty: choose another --output" in result.stderr) == (2, True)


def test_a_dry_run_of_what_is_done_says_so(run: Run) -> None:
    assert run().exit_code == 0
    result = run("--dry-run", "--resume")
    assert result.exit_code == 0
    assert "is finished: there is nothing to resume" in result.stderr
    assert not result.stdout


def test_an_unfinished_run_is_refused_before_anything_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        (job, _) = arguments
        (job.staging.solved / "something").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setitem(pipeline.PRUNERS, "slimllm", interrupted)
        assert run().exit_code == 130
    result = run("--dry-run")
    assert (result.exit_code, "pass --resume to continue from there" in result.stderr) == (2, True)
    assert run("--dry-run", "--resume").exit_code == 0
    result = run("--dry-run", "--resume", "--sparsity", ".5")
    assert (result.exit_code, "had other settings (sparsity" in result.stderr) == (2, True)
