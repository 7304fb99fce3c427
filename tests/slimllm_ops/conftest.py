"""Random models of every Llama build and of every family, with random norms and biases."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimllm_ops.models.families import FAMILIES, family_named
from tests.tiny import first_of_build, save_tiny

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


# For this package, families whose rows say the same are the same; `make test` runs one of them.
FAMILY_PARAMS = [
    pytest.param(family.model_type, marks=() if first_of_build(family) else pytest.mark.slow) for family in FAMILIES
]


@pytest.fixture(scope="session", params=[*BUILDS, *FAMILY_PARAMS])
def model_dir(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Each build of a Llama in turn, then each family."""
    if request.param in BUILDS:
        return make_model(**BUILDS[request.param])
    return save_tiny(family_named(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def biased_model(make_model: Callable[..., Path]) -> Path:
    """A random Llama whose every projection has a bias."""
    return make_model(**BUILDS["biased"])


@pytest.fixture(scope="session")
def ids(token_blocks: np.ndarray) -> torch.Tensor:
    """All token blocks as one batch."""
    return torch.from_numpy(token_blocks.astype(np.int64))
