"""Holds the table of model families, the classes of pruned models, and the checks of untrusted configs."""
