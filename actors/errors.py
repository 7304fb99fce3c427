"""Errors of a group of shards; each pickles, and names the shard it is about."""


class ShardError(RuntimeError):
    """A shard died, could not be placed, or did not answer in time; the message says which, and what to do."""


class HeadLostError(ShardError):
    """Ray's head is gone, and with it all that runs there; another head can go on from what is on disk."""


class WorkerLostError(ShardError):
    """A worker or its node is gone, with what it held; others can do again what it did."""
