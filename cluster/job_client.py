"""Ray's client of a job server, with a limit on every wait; it waits for a server that has just started."""

import time
from collections.abc import Callable
from typing import Any

import requests
from ray.job_submission import JobSubmissionClient

# Limits to connect, and for each answer. Ray's own client waits forever.
REQUEST_SECONDS = (10.0, 60.0)
# How long a server may start, how long nothing may listen at its port, and the time between two questions.
STARTING_SECONDS = 60.0
REFUSING_SECONDS = 3.0
AGAIN_SECONDS = 1.0
# What a head answers whose agent has not started: no job was made.
NO_AGENT = "No available agent"
Tell = Callable[[str], None]


class JobClient(JobSubmissionClient):
    """Ray's client.

    Args:
        address: The job server's URL.
        tell: Receives a line when the client waits.
    """

    def __init__(self, address: str, tell: Tell) -> None:
        self._tell, self._told = tell, False
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> requests.Response:
        begun = time.monotonic()
        while True:
            try:
                answer = super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **arguments)
                if not _is_starting(method, answer) or time.monotonic() - begun > STARTING_SECONDS:
                    return answer
                self._tell_once()
            except requests.ConnectionError as error:
                if not _is_refused(error) or time.monotonic() - begun > REFUSING_SECONDS:
                    raise
            time.sleep(AGAIN_SECONDS)

    def _tell_once(self) -> None:
        if not self._told:
            self._tell(f"waiting up to {STARTING_SECONDS:.0f} s for the cluster's job server, which is starting")
        self._told = True


def _is_starting(method: str, answer: requests.Response) -> bool:
    """Return whether a server is not ready, and has done nothing of what was asked."""
    if answer.status_code == 503 or (answer.status_code == 500 and NO_AGENT in answer.text):
        return True
    # A proxy that has no answer does not know whether the server has made a job.
    return method == "GET" and answer.status_code in (502, 504)


def _is_refused(error: BaseException | None) -> bool:
    """Return whether nothing listens at the port, by the error or by what is inside it."""
    while error is not None:
        reason = getattr(next(iter(error.args), None), "reason", None)
        if isinstance(error, ConnectionRefusedError) or isinstance(reason, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
