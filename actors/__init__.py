"""Workers that hold shards of the calibration data, and the group that drives them."""

from actors.errors import ShardError
from actors.group import ShardGroup
from actors.pool import SolverPool, results
from actors.shard import PROBED_TOKENS, Shard

__all__ = ["PROBED_TOKENS", "Shard", "ShardError", "ShardGroup", "SolverPool", "results"]
