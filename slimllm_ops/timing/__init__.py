"""Measures how fast and how large a causal language model is: its passes, work, memory, and widths that cost speed."""
