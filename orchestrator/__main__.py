"""`python -m orchestrator` is the command `slimllm`, for where the script is not on the path."""

from orchestrator.cli import main

main(prog_name="slimllm")
