"""What is wrong with a cluster, or with what was asked of it."""


class ClusterError(ValueError):
    """The cluster is not there, or lacks what was asked for; the message says what to change."""
