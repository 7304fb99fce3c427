"""Runs hidden states through a model, one layer at a time."""
