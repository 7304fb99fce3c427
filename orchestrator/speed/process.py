"""Starts a process for each model, and asks it to measure."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.speed.worker import Failed
from slimllm_ops.errors import InputError
from slimllm_ops.timing.engines import Engine, OpenEngine

# What a process runs, with the descriptor of its pipe as an argument.
PROGRAM = "import sys; from orchestrator.speed.worker import serve; serve(int(sys.argv[1]))"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ModelProcess:
    """A process that holds one model.

    It is started as a program, and not by `multiprocessing`, which would run a user's script again in it.

    Args:
        name: The model's name in messages.
        process: The process.
        pipe: The pipe to it.
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
        self.name, self._process, self._pipe = name, process, pipe

    def open(self, open_engine: OpenEngine, place: Path, most_tokens: int) -> None:
        """Open the engine, which loads the model.

        Raises:
            InputError: It cannot.
        """
        self._send(open_engine, place, most_tokens)

    def ask(
        self,
        function: Callable[Concatenate[Engine, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Call a function with the engine there, and return its result.

        Raises:
            InputError: It failed, or the process ended.
        """
        assert not named, "arguments are sent by position"
        return self._send(function, *arguments)

    def _send(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self._pipe.send((function, *arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise InputError(
                f"the process of {self.name} ended with code {code}, as for want of memory: pass a smaller "
                f"--batch-size or --prompt-length"
            ) from error
        if isinstance(answer, Failed):
            raise InputError(f"{self.name} cannot be measured: {answer.reason}")
        return answer


@contextmanager
def start_process(name: str, threads: int | None, verbose: bool) -> Iterator[ModelProcess]:
    """Start a process for a model; it ends with the block.

    Args:
        name: The model's name.
        threads: Its CPU threads; None for one per core.
        verbose: Whether its warnings and tracebacks are shown.
    """
    ours, theirs = Pipe()
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | limits,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=None if verbose else subprocess.DEVNULL,
        stderr=None if verbose else subprocess.DEVNULL,
    )
    theirs.close()
    try:
        yield ModelProcess(name, process, ours)
    finally:
        process.kill()
        process.wait()
        ours.close()
