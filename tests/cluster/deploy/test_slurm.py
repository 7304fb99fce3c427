"""The Slurm script runs, with a real Ray of two nodes on loopback and stand-ins for two Slurm commands.

The stand-ins do what the commands do, as far as one machine allows: `srun` runs a command once per task and forwards
SIGTERM, and ends with the highest code of them; `scontrol` prints the names of nodes and records its arguments.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.cluster.deploy.commands import DEPLOY, settings_of

SCRIPT = DEPLOY / "slurm" / "prune.sbatch"
SRUN = """#!/usr/bin/env bash
count=1
while [[ $1 == --* ]]; do
  if [[ $1 == --ntasks=* ]]; then count=${1#*=}; fi
  shift
done
if [[ $1 == "${SRUN_REFUSES:-}" ]]; then
  for word in "$@"; do
    case $word in --temp-dir=*) stat --format=%a "$(dirname "${word#*=}")" >>"$SLURM_TOLD" ;; esac
  done
  exit 1
fi
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for ((task = 0; task < count; task++)); do "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
  if ((code > status)); then status=$code; fi
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then tr , '\\n' <<<"$3"; else echo "$@" >>"$SLURM_TOLD"; fi
"""
SECONDS = 180.0

Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def job_id() -> str:
    """A number that no other job on this machine has."""
    return str(os.getpid())


@pytest.fixture
def submit(tmp_path: Path, job_id: str) -> Iterator[Submit]:
    """Start the script as Slurm starts it, in a folder of its own; whatever is left of it in the end is killed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # As it is where nobody has set any of it: that of this session's own Ray is not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environment |= {
        "PATH": f"{programs}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[3]),
        "HEAD_IP": "127.0.0.1",
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_MEM_PER_NODE": "600",
        "SLURM_TOLD": str(tmp_path / "told"),
    }
    jobs: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        with (tmp_path / "log").open("a") as log:
            command = ["bash", SCRIPT, *arguments]
            options = {"cwd": tmp_path, "env": environment | variables, "stdout": log, "stderr": log}
            jobs.append(subprocess.Popen(command, text=True, start_new_session=True, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    for process in left_of(job_id):
        process.kill()


def left_of(job_id: str) -> list[psutil.Process]:
    """The processes of a job's Ray, which all have its folder among their words."""
    pattern = re.compile(rf"/slimllm-{job_id}-\d")
    return [one for one in psutil.process_iter(["cmdline"]) if pattern.search(" ".join(one.info["cmdline"] or []))]


def left_behind(folder: Path, job_id: str) -> list[object]:
    """What a job that ended should not have left: processes, Ray's files, the token."""
    deadline = time.monotonic() + 20
    while left_of(job_id) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [*left_of(job_id), *Path("/tmp").glob(f"slimllm-{job_id}-*"), *folder.glob(".slimllm-*")]


def small(model: Path, tokens: Path) -> list[str]:
    """A run on two workers, which two nodes of one CPU have room for, and one has not."""
    return [str(model), "--calibration", str(tokens), "--sparsity", "0.33", "--workers", "2", "--output", "out"]


def test_the_shell_and_shellcheck_find_nothing() -> None:
    checker = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for command in (["bash", "-n", SCRIPT], [checker, "--severity=style", SCRIPT]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_options_that_the_script_adds_are_options() -> None:
    (line,) = re.findall(r"^(slimllm prune .*) &$", SCRIPT.read_text(), flags=re.MULTILINE)
    config = settings_of(line.replace('"$@"', "MODEL").replace('"$address"', "127.0.0.1:6379"))
    assert (config.address, config.shared_storage, config.resume) == ("127.0.0.1:6379", True, True)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SLURM_JOB_ID": ""}, "this is not a Slurm job"),
        ({"HEAD_IP": "", "SLURM_JOB_NODELIST": "localhost,two"}, "localhost is 127.0.0.1 to itself: set HEAD_IP"),
        ({"HEAD_IP": "", "SLURM_JOB_NODELIST": "no..name,two"}, "no..name has no address: set HEAD_IP"),
        ({"SRUN_REFUSES": "ray"}, "Ray's head ended: see above"),
    ],
)
def test_what_cannot_be_is_said(
    submit: Submit, tmp_path: Path, job_id: str, variables: dict[str, str], reason: str
) -> None:
    job = submit("MODEL", **variables)
    assert job.wait(timeout=SECONDS) == 1
    assert f"prune.sbatch: {reason}" in " ".join((tmp_path / "log").read_text().split())
    assert left_behind(tmp_path, job_id) == []


def test_rays_folder_on_a_node_is_the_users_alone(submit: Submit, tmp_path: Path, job_id: str) -> None:
    assert submit("MODEL", SRUN_REFUSES="ray").wait(timeout=SECONDS) == 1
    assert (tmp_path / "told").read_text() == "700\n"
    assert left_behind(tmp_path, job_id) == []


@pytest.mark.parametrize("kind", ["a link", "a file", "readable", "another's"])
def test_a_folder_of_others_in_its_place_is_refused_and_left(
    submit: Submit, tmp_path: Path, job_id: str, kind: str
) -> None:
    place, elsewhere = tmp_path / f"slimllm-{job_id}-0", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "precious").touch()
    if kind == "a link":
        place.symlink_to(elsewhere)
    elif kind == "a file":
        place.touch(mode=0o700)
    else:
        place.mkdir(mode=0o700)
        (place / "precious").touch()
    if kind == "readable":
        place.chmod(0o755)
    if kind == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(place, 65534, -1)
    before = sorted(tmp_path.rglob("*"))
    assert submit("MODEL", RAY_TMPDIR=str(tmp_path), SRUN_REFUSES="ray").wait(timeout=SECONDS) == 1
    log = (tmp_path / "log").read_text()
    assert f"prune.sbatch: {place} on " in log
    assert "is not a private folder of this user: remove it, or set RAY_TMPDIR" in log
    # Ray was not asked for, and nothing was removed.
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "log") == before


@pytest.mark.parametrize("dangling", [True, False])
def test_the_token_is_not_written_to_what_is_there(submit: Submit, tmp_path: Path, job_id: str, dangling: bool) -> None:
    token, target = tmp_path / f".slimllm-{job_id}-0.token", tmp_path / "target"
    if not dangling:
        target.write_text("of others")
    token.symlink_to(target)
    assert submit("MODEL", RAY_TMPDIR=str(tmp_path), SRUN_REFUSES="ray").wait(timeout=SECONDS) == 1
    assert f"prune.sbatch: the token cannot be written to {token}" in (tmp_path / "log").read_text()
    assert token.is_symlink()
    assert not (tmp_path / f"slimllm-{job_id}-0").exists()
    assert target.exists() != dangling
    assert dangling or target.read_text() == "of others"


@pytest.mark.slow
def test_a_job_of_two_nodes_prunes_a_model_and_leaves_nothing_else(
    submit: Submit, tmp_path: Path, job_id: str, gqa_model: Path, token_file: Path
) -> None:
    job = submit(*small(gqa_model, token_file))
    code = job.wait(timeout=SECONDS)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(gqa_model)
    assert pruned.num_parameters() < dense.num_parameters()
    plan = json.loads((tmp_path / "out" / "pruning" / "plan.json").read_text())
    assert plan["params"]["num_workers"] == 2
    assert left_behind(tmp_path, job_id) == []
    assert not (tmp_path / "told").exists()


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(
    submit: Submit, tmp_path: Path, job_id: str, make_llama: Callable[..., Path], token_file: Path
) -> None:
    # Of many layers, so that there is time for something to happen.
    arguments = small(make_llama(num_hidden_layers=30, hidden_size=16, intermediate_size=32), token_file)
    job = submit(*arguments)
    solved = tmp_path / ".out.partial" / ".work" / "solved" / "pruned.log" / "layer-00003.json"
    deadline = time.monotonic() + SECONDS
    while not solved.exists():
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Ray opens the folder that it is given to everyone, so that one is inside.
    assert stat.S_IMODE(Path(f"/tmp/slimllm-{job_id}-0").stat().st_mode) == 0o700
    # Slurm's `--signal=B:USR1` is for the script alone.
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=SECONDS) == 143, (tmp_path / "log").read_text()
    assert (tmp_path / "told").read_text() == f"requeue {job_id}\n"
    assert left_behind(tmp_path, job_id) == []
    assert submit(*arguments, SLURM_RESTART_COUNT="1").wait(timeout=SECONDS) == 0
    log = (tmp_path / "log").read_text()
    assert "continuing from earlier results" in log
    assert (tmp_path / "out" / "config.json").is_file()
    assert left_behind(tmp_path, job_id) == []
