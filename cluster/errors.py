"""Defines the error that this package raises."""


class ClusterError(ValueError):
    """A cluster that is missing, or lacks what was asked for; the message says what to change."""
