"""Runs the `slimllm` command as `python -m orchestrator`, in case the script is not on the path."""

from orchestrator.cli import main

main(prog_name="slimllm")
