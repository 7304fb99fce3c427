"""Weights."""

from slimllm_ops.stream.layer_stream import compute_dtype  # noqa: F401
