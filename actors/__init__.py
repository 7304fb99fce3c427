"""Workers that hold shards of the calibration data, and the group that drives them.

Only `ray_workers`, `placement`, `serving`, `waiting` and `node_tasks` need Ray.
"""
