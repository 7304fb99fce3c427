"""Random models of every build that a family knows, with biases and norms that are not those of a fresh model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

BUILDS: dict[str, dict[str, object]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biased": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "wide-heads": {"num_key_value_heads": 2, "head_dim": 12},
}


@pytest.fixture(scope="session")
def make_model(make_llama: Callable[..., Path]) -> Callable[..., Path]:
    """Save a random Llama whose norms and biases are random too (a fresh one has ones and zeros)."""

    def make(**settings: object) -> Path:
        directory = make_llama(**settings)
        for path in directory.glob("*.safetensors"):
            generator = torch.Generator().manual_seed(1)
            tensors = load_file(path)
            for tensor in tensors.values():
                if tensor.dim() == 1:
                    tensor += 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)
            save_file(tensors, path, metadata={"format": "pt"})
        return directory

    return make


@pytest.fixture(scope="session", params=BUILDS)
def model_dir(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    """Each build in turn."""
    return make_model(**BUILDS[request.param])


@pytest.fixture(scope="session")
def biased_model(make_model: Callable[..., Path]) -> Path:
    """A random Llama whose every projection has a bias."""
    return make_model(**BUILDS["biased"])


@pytest.fixture(scope="session")
def ids(token_blocks: np.ndarray) -> torch.Tensor:
    """All token blocks as one batch."""
    return torch.from_numpy(token_blocks.astype(np.int64))
