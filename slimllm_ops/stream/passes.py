"""The passes of a stream."""

from slimllm_ops.stream.layer_stream import PROBED_TOKENS, LayerStream  # noqa: F401
