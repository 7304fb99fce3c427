"""Every family can be pruned by both methods with any number of shards, and meets the same contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.pipeline import PruneResult
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.models.families import FAMILIES, Family
from tests.elsewhere import Elsewhere
from tests.tiny import first_of_build, save_tiny

T = TypeVar("T")
# One family of each build of a layer: plain, stacked projections, a parallel and a fused one, no norm of the input,
# norms of the output, a multiplier, no modules for the MLP, experts.
BUILDS = ("Llama", "Phi3", "GPTNeoX", "Olmo2", "Gemma2", "Granite", "OPT", "Mixtral")


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(token_blocks[:3].astype(np.int64))


class ByFamily(dict[str, T]):
    """What is made for each family when a test first asks for it."""

    def __init__(self, make: Callable[[str], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> T:
        self[name] = self._make(name)
        return self[name]


Models = ByFamily[Path]
Runs = ByFamily[PruneResult]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A random model of every family."""
    by_name = {family.name: family for family in FAMILIES}
    return ByFamily(lambda name: save_tiny(by_name[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def runs(prune_model: Callable[..., PruneResult], dense: Models) -> Runs:
    """Every family pruned by `gram` on one shard."""
    return ByFamily(lambda name: prune_model(dense[name], method="gram"))


@pytest.fixture(scope="module")
def papers_runs(prune_model: Callable[..., PruneResult], dense: Models) -> Runs:
    """Every family pruned by `slimllm` on one shard."""
    return ByFamily(lambda name: prune_model(dense[name], method="slimllm"))


def plans_of(run: PruneResult) -> tuple[LayerPlan, ...]:
    return Plan.read(Path(run.output) / "pruning" / "plan.json").layers


def load(run: PruneResult, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run.output, **settings).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def each_family(test: Any) -> Any:
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)(test)


def each_build(test: Any) -> Any:
    """Test the first family of each build; `make slow` tests the families that are built alike."""
    families = [
        pytest.param(family, marks=() if first_of_build(family) else pytest.mark.slow, id=family.name)
        for family in FAMILIES
    ]
    return pytest.mark.parametrize("family", families)(test)


@each_family
def test_a_third_is_gone_and_what_is_left_is_what_the_plan_says(family: Family, runs: Runs) -> None:
    run, model = runs[family.name], load(runs[family.name])
    assert run.totals.sparsity == pytest.approx(0.33, abs=0.01)
    for index, layer in enumerate(plans_of(run)):
        if layer.mlp is not None:
            weight = dict(model.get_submodule(f"{family.layers}.{index}").named_parameters())[family.mlp.output_weight]
            assert weight.numel() // weight.shape[-2] == len(layer.mlp.kept)
        assert layer.attention is None or not family.attention.reading.whole


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("gram", name) for name in BUILDS),
        # Shards of the other method do so too: a plain build, a parallel one and experts show it in seconds.
        *(
            pytest.param("slimllm", name, marks=() if name in ("Llama", "GPTNeoX", "Mixtral") else pytest.mark.slow)
            for name in BUILDS
        ),
    ],
)
def test_any_number_of_shards_gives_the_same_model(
    method: str,
    name: str,
    runs: Runs,
    papers_runs: Runs,
    dense: Models,
    prune_model: Callable[..., PruneResult],
) -> None:
    one = {"gram": runs, "slimllm": papers_runs}[method][name]
    three = prune_model(dense[name], method=method, workers=3)
    for layer, other in zip(plans_of(one), plans_of(three), strict=True):
        for decision, same in ((layer.attention, other.attention), (layer.mlp, other.mlp)):
            assert (decision and decision.kept) == (same and same.kept)
    checkpoints = [Checkpoint.open(run.output) for run in (one, three)]
    for index in range(3):
        tensors, others = (checkpoint.read_layer(index) for checkpoint in checkpoints)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[key], rtol=1e-4, atol=1e-5)


@each_build
def test_the_paper_takes_heads_wherever_they_can_go(family: Family, papers_runs: Runs) -> None:
    # Its ratios are those of heads and channels alike.
    plans = plans_of(papers_runs[family.name])
    assert any(layer.attention for layer in plans) != bool(family.attention.reading.whole)
    assert any(layer.mlp for layer in plans)


@each_family
def test_every_attention_computes_the_same(family: Family, runs: Runs, ids: torch.Tensor) -> None:
    model = load(runs[family.name], attn_implementation="eager")
    expected = logits(model, ids)
    if not model._supports_sdpa:
        pytest.skip("transformers has eager attention alone for this family")
    found = logits(load(runs[family.name], attn_implementation="sdpa"), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_family
def test_generation_with_a_cache_is_the_one_without(family: Family, runs: Runs, ids: torch.Tensor) -> None:
    model, settings = load(runs[family.name]), {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (3, 26)


@each_family
def test_tied_embeddings_stay_tied(family: Family, runs: Runs, dense: Models) -> None:
    before = AutoModelForCausalLM.from_pretrained(dense[family.name])
    for model in (before, load(runs[family.name])):
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == before.config.tie_word_embeddings


@each_family
def test_every_family_loads_where_the_package_is_not(
    family: Family, runs: Runs, ids: torch.Tensor, elsewhere: Elsewhere
) -> None:
    run = runs[family.name]
    torch.testing.assert_close(elsewhere.logits(run.output, ids), logits(load(run), ids), rtol=1e-4, atol=1e-5)


def test_a_base_model_loads_where_the_package_is_not(
    runs: Runs, ids: torch.Tensor, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    program = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(runs["Phi3"].output)!r}, trust_remote_code=True).eval()
with torch.inference_mode():
    print(type(model).__name__, model(torch.tensor({ids.tolist()})).last_hidden_state.square().mean().item())
"""
    ended = elsewhere.run(program, tmp_path)
    assert ended.code == 0, ended.stderr[-2000:]
    name, power = ended.stdout.split()[-2:]
    with torch.inference_mode():
        expected = load(runs["Phi3"]).base_model(ids).last_hidden_state.square().mean().item()
    assert (name, float(power)) == ("PrunedPhi3Model", pytest.approx(expected, rel=1e-4))


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Olmo2", "OPT", "Phi3", "GPTNeoX", "Apertus", "Cohere2", "Glm4"])
def test_refining_brings_every_build_nearer_to_the_dense_model(
    name: str,
    runs: Runs,
    dense: Models,
    prune_model: Callable[..., PruneResult],
    token_blocks: np.ndarray,
) -> None:
    every = torch.from_numpy(token_blocks.astype(np.int64))
    expected = logits(AutoModelForCausalLM.from_pretrained(dense[name]).eval(), every)
    refined = prune_model(dense[name], method="gram", refine=True)
    before, after = ((logits(load(run), every) - expected).square().mean() for run in (runs[name], refined))
    assert after < 0.97 * before
