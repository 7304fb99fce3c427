"""What a run needs, and whether the machines have it."""
