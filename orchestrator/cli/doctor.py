"""Defines `doctor`, the command that checks everything before a run."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.exit_codes import REFUSED, exit_on_error, print_json
from orchestrator.cli.options import TELLING, Command, with_options, with_settings
from orchestrator.cli.runs import configure
from orchestrator.config import PruneConfig
from orchestrator.secrets import masked

if TYPE_CHECKING:
    from orchestrator.preflight.checks import Check


@click.command(cls=Command)
@click.argument("model", required=False)
@with_settings("doctor")
@with_options("config", *TELLING)
def doctor(config_file: Path | None, as_json: bool, verbose: bool, **flags: Any) -> None:
    """Check what a run would find: versions, Ray, nodes, memory for MODEL, tracking server, hub, disk.

    Without MODEL, skip the checks that need one. Exit code 0 if all is well, 2 if something needs fixing.
    """
    with exit_on_error(as_json=as_json, verbose=verbose):
        checks = _examine(configure(PruneConfig, config_file, flags), as_json)
    if not all(check.ok for check in checks):
        sys.exit(REFUSED)


def _examine(config: PruneConfig, as_json: bool) -> "list[Check]":
    from orchestrator.preflight.doctor import diagnose

    checks = []
    for found in diagnose(config):
        check = replace(found, found=masked(found.found), remedy=masked(found.remedy))
        checks.append(check)
        if not as_json:
            said = [f"{check.name}: {check.found}", *([] if check.ok or not check.remedy else [check.remedy])]
            click.echo(f"{'ok' if check.ok else '--'}  {': '.join(said)}")
    if as_json:
        print_json({"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]})
    return checks
