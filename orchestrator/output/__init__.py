"""Writes an output aside, and moves or uploads it only when it is complete."""
