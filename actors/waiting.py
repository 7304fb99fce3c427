"""Waiting for Ray: in pieces, so that Ctrl-C is heard, with an end, and with errors as they were raised."""

import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from actors.errors import ShardError
from slimllm_ops.errors import InputError

CALL_SECONDS = 3600.0
POLL_SECONDS = 1.0


def get_one(ref: ray.ObjectRef) -> Any:
    """Return one result; errors as in `get_in_order`."""
    return get_in_order([ref])[0]


def get_in_order(refs: list[ray.ObjectRef], seconds: float = CALL_SECONDS) -> list[Any]:
    """Return all results in order; the first error is raised at once, without waiting for the others.

    Raises:
        InputError: as a worker raised it.
        ShardError: a worker died, or did not answer in time.
    """
    deadline = time.monotonic() + seconds
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, timeout=POLL_SECONDS)
        for ref in done:
            _get(ref)
        if pending and time.monotonic() > deadline:
            raise ShardError(
                f"{len(pending)} of {len(refs)} workers did not answer within {seconds:.0f} s: "
                f"the cluster is overloaded, or has no room for so many workers"
            )
    return [_get(ref) for ref in refs]


def _get(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        # What a worker raised for the user is raised here as it was; anything else keeps its remote traceback.
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, InputError):
            raise cause from None
        raise
    except (RayActorError, WorkerCrashedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ShardError(f"a worker died: {reason}; was its node lost, or out of memory?") from error
