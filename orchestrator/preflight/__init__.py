"""Estimates what a run needs, and checks whether the machines have it."""
