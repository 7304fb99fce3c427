"""The classes of pruned models, a file for each family.

Importing the package registers them, so that their checkpoints load without remote code.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from slimllm_ops.models.pruned.pruned_gemma import PrunedGemmaForCausalLM
from slimllm_ops.models.pruned.pruned_gemma2 import PrunedGemma2ForCausalLM
from slimllm_ops.models.pruned.pruned_gemma3 import PrunedGemma3ForCausalLM
from slimllm_ops.models.pruned.pruned_gpt_neox import PrunedGPTNeoXForCausalLM
from slimllm_ops.models.pruned.pruned_granite import PrunedGraniteForCausalLM
from slimllm_ops.models.pruned.pruned_layers import LinearNames, PrunedModelMixin
from slimllm_ops.models.pruned.pruned_llama import PrunedLlamaForCausalLM
from slimllm_ops.models.pruned.pruned_mistral import PrunedMistralForCausalLM
from slimllm_ops.models.pruned.pruned_mixtral import PrunedMixtralForCausalLM
from slimllm_ops.models.pruned.pruned_olmo2 import PrunedOlmo2ForCausalLM
from slimllm_ops.models.pruned.pruned_opt import PrunedOPTForCausalLM
from slimllm_ops.models.pruned.pruned_phi3 import PrunedPhi3ForCausalLM
from slimllm_ops.models.pruned.pruned_qwen2 import PrunedQwen2ForCausalLM
from slimllm_ops.models.pruned.pruned_qwen3 import PrunedQwen3ForCausalLM
from slimllm_ops.models.pruned.pruned_qwen3_moe import PrunedQwen3MoeForCausalLM
from slimllm_ops.models.pruned.pruned_smollm3 import PrunedSmolLM3ForCausalLM
from slimllm_ops.models.pruned.pruned_starcoder2 import PrunedStarcoder2ForCausalLM

__all__ = [
    "LinearNames",
    "PrunedGPTNeoXForCausalLM",
    "PrunedGemma2ForCausalLM",
    "PrunedGemma3ForCausalLM",
    "PrunedGemmaForCausalLM",
    "PrunedGraniteForCausalLM",
    "PrunedLlamaForCausalLM",
    "PrunedMistralForCausalLM",
    "PrunedMixtralForCausalLM",
    "PrunedModelMixin",
    "PrunedOPTForCausalLM",
    "PrunedOlmo2ForCausalLM",
    "PrunedPhi3ForCausalLM",
    "PrunedQwen2ForCausalLM",
    "PrunedQwen3ForCausalLM",
    "PrunedQwen3MoeForCausalLM",
    "PrunedSmolLM3ForCausalLM",
    "PrunedStarcoder2ForCausalLM",
    "register",
]


def register(model: Any) -> None:
    """Let transformers' auto classes know a pruned model, and name its file in the `auto_map` of what it saves."""
    config = model.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # `save_pretrained` of a loaded model then copies the files again.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
