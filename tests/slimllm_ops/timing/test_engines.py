"""Engines generate the tokens of transformers' `generate`, one time for each, and tell where the time goes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimllm_ops.errors import InputError
from slimllm_ops.models.families import family_named
from slimllm_ops.timing import engines
from slimllm_ops.timing.engines import CompiledEngine, OpenEngine, TransformersEngine
from slimllm_ops.timing.generation import random_prompts
from slimllm_ops.timing.profile import ATTENTION, PRODUCTS, REST, kind_of
from tests.slimllm_ops.pruned import write_uneven

BATCH, LENGTH, NEW, SEED = 2, 7, 5, 3


def expected_tokens(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompts_BT = random_prompts(97, BATCH, LENGTH, SEED)
    # No token ends a sequence.
    model.generation_config.eos_token_id = None
    return model.generate(prompts_BT, max_new_tokens=NEW, do_sample=False)[:, LENGTH:].tolist()


@pytest.mark.parametrize(
    "open_engine",
    [TransformersEngine, pytest.param(CompiledEngine, marks=pytest.mark.slow)],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("is_pruned", [False, True])
def test_tokens_are_those_of_generate(
    open_engine: OpenEngine, is_pruned: bool, gqa_model: Path, tmp_path: Path
) -> None:
    directory = write_uneven(family_named("llama"), tmp_path) if is_pruned else gqa_model
    measured = open_engine(directory, 64).generate(BATCH, LENGTH, NEW, SEED)
    assert list(map(list, measured.tokens)) == expected_tokens(directory)
    assert measured.first_seconds > 0
    assert len(measured.token_seconds) == NEW - 1
    assert measured.later_seconds == pytest.approx(sum(measured.token_seconds))


def test_the_same_seed_gives_the_same_prompts() -> None:
    first, again, other = (random_prompts(97, 2, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() < 97


def test_a_profile_has_products_attention_and_the_rest(gqa_model: Path) -> None:
    seconds = TransformersEngine(gqa_model, 64).profile(1, 32, SEED)
    assert set(seconds) == {PRODUCTS, ATTENTION, REST}
    assert all(spent > 0 for spent in seconds.values())


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", PRODUCTS),
        ("aten::mm", PRODUCTS),
        ("aten::bmm", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::mul", REST),
        ("aten::cumsum", REST),
    ],
)
def test_operators_have_a_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_a_machine_without_a_compiler_gets_one_line(gqa_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object) -> object:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(engines.torch, "compile", refuse)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler.*No working C\+\+ compiler found\)"):
        CompiledEngine(gqa_model, 64)
