"""Checkpoints on disk: read, pruned and written a layer at a time."""
