"""Workers that hold shards of the calibration data, and the group that drives them."""

from actors.errors import ShardError
from actors.group import ShardGroup
from actors.shard import Shard

__all__ = ["Shard", "ShardError", "ShardGroup"]
