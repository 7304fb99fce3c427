"""Waiting for Ray: in pieces, so that Ctrl-C is heard, with an end, and with errors as they were raised."""

import socket
import time
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.errors import HeadLostError, ShardError, WorkerLostError
from slimllm_ops.errors import InputError, MiscountError

CALL_SECONDS = 3600.0
POLL_SECONDS = 1.0
# Ray ends a process that has not heard of the head for a minute, with no chance to say what is kept.
HEAD_SECONDS = 15.0

# What a process, a node or what they held is gone by. A worker sees it too, of the server that it reads from.
LOSSES = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, GetTimeoutError)


def get_one(ref: ray.ObjectRef) -> Any:
    """Return one result; errors as in `get_in_order`."""
    return get_in_order([ref])[0]


def get_in_order(refs: list[ray.ObjectRef], seconds: float = CALL_SECONDS) -> list[Any]:
    """Return all results in order; the first error is raised at once, without waiting for the others.

    Raises:
        InputError, MiscountError: as a worker raised it.
        WorkerLostError: a worker died.
        HeadLostError: Ray's head is gone.
        ShardError: a worker did not answer in time.
    """
    deadline = time.monotonic() + seconds
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, timeout=POLL_SECONDS)
        for ref in done:
            _get(ref)
        if not done:
            require_head()
        if pending and time.monotonic() > deadline:
            raise ShardError(
                f"{len(pending)} of {len(refs)} workers did not answer within {seconds:.0f} s: "
                f"the cluster is overloaded, or has no room for so many workers"
            )
    return [_get(ref) for ref in refs]


def which_answer(refs: list[ray.ObjectRef], seconds: float) -> list[bool | None]:
    """Return of each call whether it gives a result; None where it gives nothing in time."""
    deadline = time.monotonic() + seconds
    pending = list(refs)
    while pending and time.monotonic() < deadline:
        require_head()
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
    return [None if ref in pending else _succeeds(ref) for ref in refs]


def require_head() -> None:
    """Require that Ray's head answers.

    Raises:
        HeadLostError: it has not for some seconds.
    """
    deadline = time.monotonic() + HEAD_SECONDS
    while not head_answers():
        if time.monotonic() > deadline:
            raise HeadLostError(f"the head of Ray has not answered for {HEAD_SECONDS:.0f} s: start a new one")
        time.sleep(POLL_SECONDS)


def head_answers() -> bool:
    """Return whether Ray's head takes connections; a client of Ray, which cannot reach it, believes so."""
    if ray.util.client.ray.is_connected():
        return True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=HEAD_SECONDS).close()
    except OSError:
        return False
    return True


def _succeeds(ref: ray.ObjectRef) -> bool:
    try:
        _get(ref)
    except WorkerLostError:
        return False
    return True


def _get(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except (RayTaskError, *LOSSES) as error:
        # What a worker raised for the user is raised here as it was; anything else keeps its remote traceback.
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, InputError | MiscountError):
            raise cause from None
        if isinstance(cause, LOSSES):
            reason = str(cause).strip().splitlines()[0]
            raise WorkerLostError(f"a worker died: {reason}; was its node lost, or out of memory?") from error
        raise
