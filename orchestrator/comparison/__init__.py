"""Compares methods on one model, with the same data and the same number of parameters left."""
