"""Runs `slimllm` in this process, notes when each stage up to the first layer is over, and ends it there.

`python -P startup_marks.py MARKS STARTED prune ...` writes to MARKS, as JSON, the seconds since STARTED, a UNIX time.
`benchmarks/startup.py` runs this file by its path in the environment of the checkout that it measures, so this file
imports nothing from its own checkout.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

MARKS, STARTED = Path(sys.argv[1]), float(sys.argv[2])
marks: dict[str, float] = {}


def note(mark: str) -> None:
    """Note the time of a mark, the first time only."""
    marks.setdefault(mark, time.time() - STARTED)


def note_return(owner: Any, name: str, mark: str) -> None:
    """Wrap a function so that it notes when it returns."""
    function = getattr(owner, name)

    @wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        note(mark)
        return result

    setattr(owner, name, noting)


def stop_after_a_layer(owner: Any) -> None:
    """Wrap `Reporter.layers` so that it ends the run, as Ctrl-C does, when the first layer is done."""
    layers: Callable[..., Iterator[int]] = owner.layers

    @wraps(layers)
    def stopping(*args: Any, **kwargs: Any) -> Iterator[int]:
        for layer in layers(*args, **kwargs):
            yield layer
            note("first layer")
            MARKS.write_text(json.dumps(marks))
            raise KeyboardInterrupt

    owner.layers = stopping


def watch_pipeline(pipeline: ModuleType) -> None:
    """Note when the pipeline is imported, and when it has its inputs."""
    note("imports")
    note_return(pipeline, "load_inputs", "inputs")


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "orchestrator.pipeline": watch_pipeline,
    "orchestrator.progress": lambda module: stop_after_a_layer(module.Reporter),
    "ray": lambda module: note_return(module, "init", "Ray up"),
    "mlflow.tracking.client": lambda module: note_return(module.MlflowClient, "create_run", "MLflow run begun"),
    "actors.group": lambda module: note_return(module.ShardGroup, "open_stream", "workers hold their data"),
}


def main() -> None:
    """Run the command line with the remaining arguments."""
    for name, hook in HOOKS.items():
        wrapt.register_post_import_hook(hook, name)
    sys.argv = ["slimllm", *sys.argv[3:]]
    from orchestrator.cli import main as slimllm

    slimllm()


if __name__ == "__main__":
    main()
