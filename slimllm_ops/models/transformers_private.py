"""Uses what transformers does not document. tests/slimllm_ops/models/test_transformers_private.py says what we expect.

transformers is imported only when it is used.
"""

from contextlib import AbstractContextManager
from typing import Any

# Where transformers keeps the table of configs, which `AutoConfig` reads.
CONFIG_TABLE = "transformers.models.auto.configuration_auto"


def no_init_weights() -> AbstractContextManager[Any]:
    """Return a context in which models are built without random values for their weights."""
    from transformers import initialization

    return initialization.no_init_weights()


def llama_rotary(config: Any) -> Any:
    """Return a Llama's rotary embedding: `inv_freq` (W/2,) and `attention_scaling`, for any scaling that it knows."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)
