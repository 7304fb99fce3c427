"""The sensitivities of a layer are the squared norms of the loss's gradients in it, as autograd has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import FAMILIES, Family, family_of
from slimllm_ops.moments.states import SpilledStates, StateStore
from slimllm_ops.stream import passes, sensitivity
from slimllm_ops.stream.padding import PADDING
from slimllm_ops.stream.sensitivity import SensitivityStream
from tests.slimllm_ops.stream.whole import NUM_LAYERS
from tests.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture
def likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each token's likeliest successor in place of a sample, so that the whole model can have the same ones."""
    monkeypatch.setattr(sensitivity, "sample", lambda logits_NV, uniform_N: logits_NV.argmax(dim=-1))


def measured(directory: Path, batches: list[torch.Tensor], store: StateStore = list) -> list[Any]:
    stream = SensitivityStream(Checkpoint.open(directory), batches, CPU, store)
    for layer in range(NUM_LAYERS):
        stream.forward_kept(layer)
    stream.begin_backward()
    found = [stream.backward(layer) for layer in reversed(range(NUM_LAYERS))][::-1]
    stream.close()
    assert {one.mlp.count for one in found} == {sum(int((ids != PADDING).sum()) for ids in batches)}
    return [(*one.value.modules, one.value.output) for one in found]


def expected(directory: Path, blocks: list[torch.Tensor]) -> list[Any]:
    """Return E[g g^T] and E|g|^2 of every layer, from one backward pass through the whole model for each block."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    family, outputs = family_of(model.config), dict[int, torch.Tensor]()
    for layer, module in enumerate(model.get_submodule(family.layers)):
        parts = [one.module if one.has_experts else one.output for one in family.branches]
        for place, part in enumerate([*map(module.get_submodule, parts), module]):

            def keep(module: torch.nn.Module, arguments: tuple, output: torch.Tensor, key: int = 3 * layer + place):
                outputs[key] = output
                output.retain_grad()

            part.register_forward_hook(keep)
    totals: list[Any] = [0.0] * (3 * NUM_LAYERS)
    for ids in blocks:
        logits = model(ids[None]).logits[0].float()
        functional.cross_entropy(logits, logits.detach().argmax(dim=-1), reduction="sum").backward()
        for key, output in outputs.items():
            gradient_ND = output.grad.double().flatten(0, -2)
            totals[key] += (gradient_ND.T @ gradient_ND).numpy()
    means = [total / sum(len(ids) for ids in blocks) for total in totals]
    return [(*means[start : start + 2], np.trace(means[start + 2])) for start in range(0, len(means), 3)]


def require_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    for layer, other in zip(found, expected, strict=True):
        for one, right in zip(layer, other, strict=True):
            np.testing.assert_allclose(one, right, rtol=tolerance, atol=tolerance * np.abs(right).max())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
@pytest.mark.usefixtures("likeliest")
def test_it_is_what_autograd_gives_for_the_whole_model(
    family: Family, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    save_tiny(family, tmp_path)
    require_close(measured(tmp_path, batches), expected(tmp_path, list(torch.cat(batches))), 1e-4)


@pytest.mark.usefixtures("likeliest")
def test_padding_has_no_loss_and_is_not_counted(gqa_model: Path, batches: list[torch.Tensor]) -> None:
    padded = [ids.clone() for ids in batches]
    padded[0][1, 5:] = PADDING
    blocks = [ids[ids != PADDING] for batch in padded for ids in batch]
    require_close(measured(gqa_model, padded), expected(gqa_model, blocks), 1e-4)


def test_neither_batches_nor_files_nor_parts_of_the_logits_change_it(
    gqa_model: Path, batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(gqa_model, batches)
    one_by_one = [ids[None] for batch in batches for ids in batch]
    require_close(measured(gqa_model, one_by_one, lambda: SpilledStates(tmp_path, CPU)), found, 1e-5)
    monkeypatch.setattr(passes, "LOGIT_TOKENS", 7)
    require_close(measured(gqa_model, batches), found, 1e-5)


def test_a_gradient_that_overflows_is_told_with_its_layer(
    gqa_model: Path, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow: Callable[..., torch.Tensor] = lambda self, states, ids: torch.full_like(states, torch.inf)  # noqa: E731
    monkeypatch.setattr(SensitivityStream, "_gradient_of_loss", overflow)
    with pytest.raises(NonFiniteError, match=r"^layer 2: the gradient of the loss holds NaN or infinity in "):
        measured(gqa_model, batches)
