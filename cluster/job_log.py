"""Reads a job's log as it grows, with a limit on every wait."""

import asyncio
from typing import Any

import aiohttp
from ray.job_submission import JobSubmissionClient


class LogTail:
    """A log that Ray's client streams, read by its own event loop with a limit on every wait."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._texts = client.tail_job_logs(job_id)
        self._next: asyncio.Task[str | None] | None = None

    def read(self, seconds: float) -> str | None:
        """Return the next text: empty if nothing came in time, None if the connection is closed."""
        self._next = self._next or self._loop.create_task(self._step())
        done, _ = self._loop.run_until_complete(asyncio.wait({self._next}, timeout=seconds))
        if not done:
            return ""
        step, self._next = self._next, None
        try:
            return step.result()
        except (aiohttp.ClientError, RuntimeError, OSError):
            return None

    async def _step(self) -> str | None:
        return await anext(self._texts, None)

    def close(self) -> None:
        """Close the connection."""
        self._loop.run_until_complete(_cancel(asyncio.all_tasks(self._loop)))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
