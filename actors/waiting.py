"""Waiting for Ray: in short steps, so that Ctrl-C works; with a time limit; with the errors that workers raised."""

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
from actors.ray_private import is_ray_client
from slimllm_ops.errors import InputError, MiscountError

CALL_SECONDS = 3600.0
POLL_SECONDS = 1.0
# Ray ends a process that has not heard from the head for a minute. The process cannot say then how to resume.
HEAD_SECONDS = 15.0

# Errors that say that a process, a node or an object is lost. A worker gets them too when its weight server is lost.
LOSSES = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, GetTimeoutError)


def get_one(ref: ray.ObjectRef) -> Any:
    """Return one result; errors as in `get_in_order`."""
    return get_in_order([ref])[0]


def get_in_order(refs: list[ray.ObjectRef], seconds: float = CALL_SECONDS) -> list[Any]:
    """Return all results in order; the first error is raised at once, without waiting for the others.

    Raises:
        InputError, MiscountError: A worker raised it.
        WorkerLostError: A worker died.
        HeadLostError: Ray's head is gone.
        ShardError: A worker did not answer in time.
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
                f"the cluster is overloaded, or has no room for all workers"
            )
    return [_get(ref) for ref in refs]


def which_answer(refs: list[ray.ObjectRef], seconds: float) -> list[bool | None]:
    """Return for each call whether it succeeded, or None if it did not answer in time."""
    deadline = time.monotonic() + seconds
    pending = list(refs)
    while pending and time.monotonic() < deadline:
        require_head()
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
    return [None if ref in pending else _succeeds(ref) for ref in refs]


def require_head() -> None:
    """Require that Ray's head answers.

    Raises:
        HeadLostError: It has not answered for `HEAD_SECONDS`.
    """
    deadline = time.monotonic() + HEAD_SECONDS
    while not head_answers():
        if time.monotonic() > deadline:
            raise HeadLostError(f"the head of Ray has not answered for {HEAD_SECONDS:.0f} s: start a new one")
        time.sleep(POLL_SECONDS)


def head_answers() -> bool:
    """Return whether Ray's head takes connections; a Ray client cannot reach the head and assumes that it does."""
    if is_ray_client():
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
        # Errors that users can act on are raised as the worker raised them; others keep their remote traceback.
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, InputError | MiscountError):
            raise cause from None
        if isinstance(cause, LOSSES):
            reason = str(cause).strip().splitlines()[0]
            raise WorkerLostError(f"a worker died: {reason}; was its node lost, or out of memory?") from error
        raise
