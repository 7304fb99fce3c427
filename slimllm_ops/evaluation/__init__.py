"""Measures whole models: the losses of next tokens, the distance from a reference model, answers for lm-eval."""
