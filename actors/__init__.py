"""Workers that hold shards of the calibration data, and the group that drives them.

`actors.shard` needs no Ray; everything else does.
"""
