"""Reads, prunes and writes checkpoints on disk, one layer at a time."""
