"""Where an output is written, and how it gets there whole."""
