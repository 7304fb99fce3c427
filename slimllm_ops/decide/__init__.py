"""Decides which units of a module stay, and fits the recovery of its output."""
