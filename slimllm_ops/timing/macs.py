"""Counts a model's multiply-accumulates and parameters without its weights.

Two short prompts pass an empty model, and torch counts the matrix products. Products with a weight grow with the length
T of the prompt, those of the attention with T^2. So two lengths tell both.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimllm_ops.errors import CheckpointError
from slimllm_ops.timing.generation import pass_of

# Products of two activations in the attention, and of tokens with their experts. The others are of a weight.
BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Macs:
    """The multiply-accumulates of a model for one sequence.

    Attributes:
        per_token: Those of a token with the layers' weights.
        per_pair: Those of a token with a token that it attends to, over all layers.
        head: Those of the head, which reads the last token only.
    """

    per_token: int
    per_pair: int
    head: int

    def of_prompt(self, length: int) -> int:
        """Return those of a prompt; each token attends to itself and to those before it."""
        return length * self.per_token + length * (length + 1) // 2 * self.per_pair + self.head


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a config whose weights have shapes and no values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager").eval()


def count_parameters(model: nn.Module) -> int:
    """Return the parameters of a model; what several modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: PreTrainedModel) -> Macs:
    """Return the multiply-accumulates of an empty model.

    The attention counts as if every token attended to all tokens before it, also in layers with a window.

    Raises:
        CheckpointError: The model does not run without values.
    """
    try:
        # A model of experts must not choose by values, which an empty one has not.
        model.set_experts_implementation("batched_mm")
        (weights_2, batched_2), (weights_4, batched_4) = _products(model, 2), _products(model, 4)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CheckpointError(f"the multiply-accumulates of this model cannot be counted: {reason}") from error
    # weights(T) = T w + head, and batched(T) = T e + T^2 a.
    per_pair = (batched_4 - 2 * batched_2) // 8
    by_weights = (weights_4 - weights_2) // 2
    return Macs(by_weights + batched_2 // 2 - 2 * per_pair, per_pair, weights_2 - 2 * by_weights)


def _products(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Return the multiply-accumulates of a prompt: of products with a weight, and of batches of products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pass_of(model)(torch.zeros(1, length, dtype=torch.long, device="meta"), None)
    counts = counter.get_flop_counts()["Global"]
    batched = sum(counts.get(product, 0) for product in BATCHED)
    return (sum(counts.values()) - batched) // 2, batched // 2
