"""Runs the `slimllm` command as `python -m orchestrator`, in case the script is not on the path."""

import os
import sys

# `python -m` puts the working directory first on the path. It may be a stranger's model, with files that would take the
# place of packages. So nothing but what Python itself has loaded is imported before it is gone.
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
if sys.path[0] == os.getcwd() and not os.path.samefile(sys.path[0], HERE):  # noqa: PTH109, PTH121
    del sys.path[0]

from orchestrator.cli import main  # noqa: E402

main(prog_name="slimllm")
