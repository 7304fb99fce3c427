"""Trains a pruned model: its losses, its parameters, the loop, and what is written at the end. Imports no Ray."""
