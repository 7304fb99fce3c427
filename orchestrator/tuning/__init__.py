"""The stages of training after pruning."""
