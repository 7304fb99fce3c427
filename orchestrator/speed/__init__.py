"""Measures the speed, memory and size of models, side by side."""
