"""Says why slimllm does not prune models of some types, by the `model_type` of their config.json.

Families with the structure that `slimllm_ops.models.families` describes are rows of its table. The types here have
another structure.
"""

from typing import Any

_LATENT = "all heads share one latent vector of keys and values (MLA), so no head has its own keys and values to remove"
_SHARED = "every token passes shared experts beside those that the router chooses, and slimllm prunes one kind of MLP"
_LINEAR = "some layers have linear attention, a recurrence that has no key/value heads to remove"
_STATES = "some layers are state-space or other recurrent layers, which have no heads and channels to remove"
_CONVOLUTIONS = "some layers are convolutions, which have no heads and channels to remove"
_TRANSPOSED = "their linear maps are stored transposed (Conv1D), with q, k and v in one of them"
_REUSED = "some layers read the keys and values of earlier layers, so heads cannot go layer by layer"
_ENCODERS = "they read text in both directions or have an encoder, and slimllm prunes decoders"

_TYPES = (
    (_LATENT, "deepseek_v2 deepseek_v3 deepseek_v32 mistral4 mistral_large4 glm4_moe_lite glm_moe_dsa minicpm3"),
    (_LATENT, "longcat_flash kimi_linear"),
    (_SHARED, "qwen2_moe glm4_moe ernie4_5_moe dots1 hunyuan_v1_moe exaone_moe cohere2_moe llama4_text solar_open"),
    (_SHARED, "granitemoeshared"),
    (_LINEAR, "qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid minimax bailing_hybrid"),
    (_STATES, "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 nemotron_h granitemoehybrid"),
    (_STATES, "recurrent_gemma rwkv xlstm"),
    (_CONVOLUTIONS, "lfm2 lfm2_moe"),
    (_TRANSPOSED, "gpt2 openai-gpt"),
    (_REUSED, "gemma3n_text gemma4_text"),
    (_ENCODERS, "bert roberta xlm-roberta albert electra distilbert deberta-v2 modernbert"),
    (_ENCODERS, "t5 mt5 bart mbart pegasus whisper"),
    ("their experts have biases, gate and up take turns by row, and every head has an attention sink", "gpt_oss"),
    ("their q_norm and k_norm can have other weights for each head (Cohere 2 models are supported)", "cohere"),
    ("their weights are ternary, and those that recover an output are not", "bitnet"),
)
REASONS = {model_type: reason for reason, types in _TYPES for model_type in types.split()}
# What the config of a model for more than text calls that of its text model, and those of its other parts.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_OTHER_PARTS = ("vision_config", "audio_config", "vision_tower_config")


def reason_against(model_type: object) -> str | None:
    """Return why models of a type are not supported, or None if nothing is known of it."""
    return REASONS.get(model_type) if isinstance(model_type, str) else None


def wrapped_text(described: dict[str, Any]) -> tuple[bool, object]:
    """Return whether a config is one of a model for more than text, and the `model_type` of its text model if given."""
    text = next((described[part] for part in _TEXT_PARTS if isinstance(described.get(part), dict)), None)
    has_others = any(isinstance(described.get(part), dict) for part in _OTHER_PARTS)
    return text is not None or has_others, text and text.get("model_type")
