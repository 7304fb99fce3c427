"""The stages of an evaluation: perplexity and the distance from a first model, and tasks through lm-eval."""
