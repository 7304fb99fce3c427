"""Defines the commands for jobs on a running Ray cluster: `submit`, `jobs list`, `jobs logs`, `jobs stop`."""

import os
import shlex
import signal
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from orchestrator.cli.exit_codes import FAILED, HUNG_UP, INTERRUPTED, TERMINATED, exit_on_error, exit_with, print_json
from orchestrator.cli.options import Command, with_options
from orchestrator.config import ConfigError
from orchestrator.secrets import masked, masked_all

if TYPE_CHECKING:
    from cluster.jobs import JobServer, JobState

# The cluster's `python`: this machine's interpreter may not exist there.
PROGRAM = ("python", "-P", "-m", "orchestrator")
PACKAGES = ("actors", "cluster", "orchestrator", "slimllm_ops")
EXAMPLES = """\b
Examples:
  slimllm submit --address http://HEAD:8265 -- prune MODEL --sparsity .2 --output /data/pruned
  slimllm submit --working-dir . --env HF_TOKEN -- prune --config run.toml --output /data/pruned
"""

address_option = click.option(
    "--address",
    metavar="URL",
    help="The cluster's job server. [$RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, http://127.0.0.1:8265]",
)


# All words after the first one of COMMAND belong to COMMAND, with or without "--".
@click.command(cls=Command, epilog=EXAMPLES, context_settings={"allow_interspersed_args": False})
@address_option
@click.option(
    "--working-dir",
    type=Path,
    metavar="DIR",
    help="A folder to upload: the job runs in a copy of it, and relative paths in COMMAND start there. Files that "
    "its .gitignore and .rayignore name are not uploaded. Without it, paths are those of the cluster's head.",
)
@click.option(
    "--env",
    "environment",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="A variable for the job, by default with its value here; repeatable. Users of the job server can read it.",
)
@click.option("--follow/--no-follow", default=True, help="Show the job's log until it ends. [--follow]")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND ...")
@click.pass_context
def submit(
    ctx: click.Context,
    address: str | None,
    working_dir: Path | None,
    environment: tuple[str, ...],
    follow: bool,
    words: tuple[str, ...],
) -> None:
    """Run COMMAND, such as `prune ...`, as a job on a Ray cluster, and exit with its exit code.

    slimllm uploads its code; the cluster's Python needs the packages that it imports. Ctrl-C stops the job or leaves it
    running.
    """
    with exit_on_error():
        _require_command(ctx, words)
        variables = dict(_variable(asked) for asked in environment)
        _warn(words, variables)
        server = _connect(address)
        packages = [_folder(package) for package in PACKAGES]
        job_id = server.submit([*PROGRAM, *words], packages, working_dir=working_dir, environment=variables)
        if not follow:
            click.echo(job_id)
            click.echo(f"to follow it: {_command('logs', job_id, address)} --follow", err=True)
            return
        click.echo(f"job {job_id} on {masked(server.address)}", err=True)
        _follow(server, job_id, address)


@click.group()
def jobs() -> None:
    """List, follow and stop jobs on a Ray cluster."""


@jobs.command("list", cls=Command)
@address_option
@with_options("json")
def list_jobs(address: str | None, as_json: bool) -> None:
    """List the jobs submitted to the cluster, newest first."""
    with exit_on_error(as_json=as_json):
        states = _connect(address).states()
    if as_json:
        print_json(masked_all([_described(state) for state in states]))
        return
    for state in states:
        run = state.metadata.get("mlflow_run_id", "-")
        click.echo(f"{state.job_id}  {state.status:9}  {_when(state):28}  {run:32}  {masked(_words(state))}")


@jobs.command(cls=Command)
@click.argument("job_id", metavar="ID")
@address_option
@click.option("--follow", is_flag=True, help="Follow the log until the job ends, then exit with its exit code.")
def logs(job_id: str, address: str | None, follow: bool) -> None:
    """Print the log of job ID."""
    with exit_on_error():
        server = _connect(address)
        if follow:
            _follow(server, job_id, address)
        click.echo(server.log(job_id), nl=False)


@jobs.command(cls=Command)
@click.argument("job_id", metavar="ID")
@address_option
def stop(job_id: str, address: str | None) -> None:
    """Stop job ID, as SIGTERM stops a command; its results so far stay, and --resume continues."""
    with exit_on_error():
        server = _connect(address)
        state = server.state(job_id)
        if not state.is_over:
            server.stop(job_id)
            state = server.wait_for_stop(job_id)
    click.echo(f"job {job_id}: {_ending(state)}")


def _require_command(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Refuse words that are not a valid command for a job, before sending anything."""
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    known = {name: command for name, command in root.command.commands.items() if command not in (submit, jobs)}
    if (command := known.get(words[0])) is None:
        raise ConfigError(f"{words[0]!r} is not a command that a job can run: pass one of {', '.join(known)}")
    asked = command.make_context(words[0], list(words[1:]), parent=root)
    if asked.params.get("address") is not None:
        raise ConfigError(f"the job is already on its cluster: pass --address before {words[0]!r} only")


def _variable(asked: str) -> tuple[str, str]:
    name, given, value = asked.partition("=")
    if not name:
        raise ConfigError(f"--env {asked!r} names no variable: pass NAME or NAME=VALUE")
    if not given and name not in os.environ:
        raise ConfigError(f"--env {name}: the variable is not set here: set it, or pass {name}=VALUE")
    return name, value if given else os.environ[name]


def _warn(words: tuple[str, ...], variables: dict[str, str]) -> None:
    """Warn of a secret that others can read, and of a tracking server that the job will not use."""
    if masked(shlex.join(words)) != shlex.join(words):
        click.echo("warning: the command holds a secret, and the job server shows commands: pass it in --env", err=True)
    name = "MLFLOW_TRACKING_URI"
    if name in os.environ and name not in variables and not any(word.startswith("--tracking-uri") for word in words):
        click.echo(f"warning: {name} is set here, but the job will not have it: pass --env {name}", err=True)


def _connect(address: str | None) -> "JobServer":
    from cluster.jobs import JobServer

    return JobServer(address, lambda line: click.echo(line, err=True))


def _folder(package: str) -> Path:
    """Return a package's folder without importing the package, which would take seconds."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations is not None, package
    return Path(next(iter(spec.submodule_search_locations)))


def _follow(server: "JobServer", job_id: str, address: str | None) -> NoReturn:
    """Show a job's log to its end, and exit with the job's code; Ctrl-C stops the job or leaves it running."""
    from cluster.jobs import LostError

    seen, over = 0, False
    while not over:
        try:
            for text in server.follow(job_id, seen):
                seen += len(text)
                click.echo(text, nl=False)
            over = True
        except LostError as error:
            _leave(f"{error}; the job keeps running if its cluster does", FAILED, job_id, address)
        except KeyboardInterrupt:
            # A second one answers the question, and does not end the command at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not _wants_stop(job_id):
                _leave(f"job {job_id} keeps running", INTERRUPTED, job_id, address)
            click.echo(f"stopping job {job_id}", err=True)
            server.stop(job_id)
        except SystemExit as ended:
            # SIGTERM and SIGHUP end this command, not the job.
            code = HUNG_UP if ended.code == HUNG_UP else TERMINATED
            _leave(f"job {job_id} keeps running", code, job_id, address)
    _exit_as(server.state(job_id))


def _wants_stop(job_id: str) -> bool:
    """Ask whether Ctrl-C should stop the job; without a terminal or an answer, it ends only this command."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    question = f"\njob {job_id}: stop the job, or detach and leave it running?"
    try:
        return click.prompt(question, type=click.Choice(["s", "d"]), err=True) == "s"
    except click.Abort:
        return False


def _leave(said: str, code: int, job_id: str, address: str | None) -> NoReturn:
    follow, stopping = _command("logs", job_id, address), _command("stop", job_id, address)
    exit_with(f"{said}; to follow it: {follow} --follow; to stop it: {stopping}", code)


def _command(name: str, job_id: str, address: str | None) -> str:
    """Return a `slimllm jobs` command for a job, with the same address."""
    return f"slimllm jobs {name} {job_id}" + (f" --address {shlex.quote(address)}" if address else "")


def _exit_as(state: "JobState") -> NoReturn:
    """Exit with the code of the job's own process, as a shell reports it."""
    click.echo(f"job {state.job_id}: {_ending(state)}", err=True)
    match state.status, state.exit_code:
        case "SUCCEEDED", _:
            sys.exit(0)
        case "STOPPED", _:
            sys.exit(TERMINATED)
        case _, None:
            sys.exit(FAILED)
        case _, int(code):
            sys.exit(code if code >= 0 else 128 - code)
    raise AssertionError(state)


def _ending(state: "JobState") -> str:
    if state.status != "FAILED":
        return state.status
    if state.exit_code is None:
        # The job never started, so no log says why.
        return f"FAILED: {masked(state.message.strip()).splitlines()[0]}"
    if state.exit_code < 0:
        return f"FAILED, ended by {signal.Signals(-state.exit_code).name}"
    return f"FAILED, exit code {state.exit_code}"


def _described(state: "JobState") -> dict[str, Any]:
    return {
        "job_id": state.job_id,
        "status": state.status,
        "words": _words(state),
        "began": state.began and datetime.fromtimestamp(state.began).astimezone().isoformat(timespec="seconds"),
        "ended": state.ended and datetime.fromtimestamp(state.ended).astimezone().isoformat(timespec="seconds"),
        "exit_code": state.exit_code,
        "mlflow_run_id": state.metadata.get("mlflow_run_id"),
        "mlflow_tracking_uri": state.metadata.get("mlflow_tracking_uri"),
    }


def _words(state: "JobState") -> str:
    """Return the arguments of a slimllm job; for another program's job, the whole command."""
    return state.command.removeprefix(shlex.join(PROGRAM) + " ")


def _when(state: "JobState") -> str:
    if state.began is None:
        return "-"
    began = datetime.fromtimestamp(state.began).strftime("%Y-%m-%d %H:%M:%S")
    return began if state.ended is None else f"{began} {state.ended - state.began:6,.0f} s"
