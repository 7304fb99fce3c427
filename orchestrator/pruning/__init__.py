"""The passes of a run: layerwise pruning, one-pass pruning, refinement and perplexity."""
