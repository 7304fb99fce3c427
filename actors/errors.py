"""Errors of a group of shards; all of them pickle."""


class ShardError(RuntimeError):
    """A worker died, could not be placed, or did not answer in time; the message says which, and what to do."""


class HeadLostError(ShardError):
    """Ray's head is gone, with everything that ran there; a run on another head can resume from disk."""


class WorkerLostError(ShardError):
    """A worker or its node is gone, with everything it held; other workers can repeat its work."""
