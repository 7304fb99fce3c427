"""A pruned model can be pruned again, by either method, and the kept units of the two runs compose."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.pipeline import PruneResult
from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision, LayerPlan, Plan
from slimllm_ops.models.families import Branch, Family, family_named, layer_shape
from tests.elsewhere import Elsewhere
from tests.orchestrator.conftest import PruneModel
from tests.tiny import save_tiny

# By so much each time: then the first leaves layers with one KV group, and the second has to spare them.
SPARSITY = 0.5


@dataclass(frozen=True)
class Case:
    """A family, and how its model is pruned the first and the second time."""

    family: Family
    first: str
    second: str
    refine: bool = False

    def __str__(self) -> str:
        return f"{self.family.name}-{self.first}-{self.second}{'-refined' * self.refine}"


# Grouped queries, stacked projections, parallel layers.
CASES = (
    Case(family_named("llama"), "gram", "slimllm"),
    Case(family_named("llama"), "gram", "gram", refine=True),
    Case(family_named("phi3"), "slimllm", "gram"),
    Case(family_named("gpt_neox"), "slimllm", "slimllm"),
)
NOT_REFINED = Case(family_named("llama"), "gram", "gram")
SLOW = pytest.param(NOT_REFINED, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Runs:
    """A dense model, the run that pruned it, and the run that pruned what came of that."""

    dense: Path
    once: PruneResult
    twice: PruneResult


RunsOf = Callable[[Case], Runs]


@pytest.fixture(scope="module")
def runs_of(prune_model: PruneModel, tmp_path_factory: pytest.TempPathFactory) -> RunsOf:
    """Prune a case's model once and again, when it is first asked for."""

    @cache
    def prune_once(family: Family, method: str) -> tuple[Path, PruneResult]:
        dense = save_tiny(family, tmp_path_factory.mktemp(family.name))
        return dense, prune_model(dense, method=method, sparsity=SPARSITY)

    @cache
    def prune_twice(case: Case) -> Runs:
        dense, once = prune_once(case.family, case.first)
        twice = prune_model(once.output, method=case.second, sparsity=SPARSITY, refine=case.refine)
        return Runs(dense, once, twice)

    return prune_twice


@pytest.fixture(scope="module")
def ids(token_blocks: np.ndarray) -> Tensor:
    """All that the runs were calibrated on."""
    return torch.from_numpy(token_blocks.astype(np.int64))


def each_case(test: Any) -> Any:
    return pytest.mark.parametrize("case", [*CASES, SLOW], ids=str)(test)


def each_case_that_keeps_its_inputs(test: Any) -> Any:
    """Refining changes the projections into a branch too."""
    cases = [case for case in CASES if not case.refine]
    return pytest.mark.parametrize("case", [*cases, SLOW], ids=str)(test)


def load(directory: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def plans(run: PruneResult) -> tuple[LayerPlan, ...]:
    return Plan.read(run.output / "pruning" / "plan.json").layers


def branches(case: Case, runs: Runs) -> Iterator[tuple[int, Branch, Decision | None, Decision | None]]:
    """Yield every branch of every layer, and what the first and the second run decided."""
    for layer, (first, second) in enumerate(zip(plans(runs.once), plans(runs.twice), strict=True)):
        yield layer, case.family.attention, first.attention, second.attention
        yield layer, case.family.mlp, first.mlp, second.mlp


@each_case
def test_half_of_what_the_first_left_goes(case: Case, runs_of: RunsOf) -> None:
    before, after = runs_of(case).once.totals, runs_of(case).twice.totals
    assert after.layer_parameters_before == before.layer_parameters_after
    missing = SPARSITY * after.layer_parameters_before - (after.layer_parameters_before - after.layer_parameters_after)
    assert 0 <= missing < measure_layer(Checkpoint.open(runs_of(case).once.output), 0).channel_parameters
    layers = load(runs_of(case).twice.output).get_submodule(case.family.layers)
    assert sum(parameter.numel() for parameter in layers.parameters()) == after.layer_parameters_after


@each_case
def test_the_config_has_the_numbers_of_the_last_model(case: Case, runs_of: RunsOf) -> None:
    config = Checkpoint.open(runs_of(case).twice.output).config
    before = Checkpoint.open(runs_of(case).once.output).config
    dense = Checkpoint.open(runs_of(case).dense).config
    layers = load(runs_of(case).twice.output).get_submodule(case.family.layers)
    for index, plan in enumerate(plans(runs_of(case).twice)):
        whole, left = layer_shape(before, index), layer_shape(config, index)
        assert left.num_key_value_heads == (len(plan.attention.kept) if plan.attention else whole.num_key_value_heads)
        assert left.intermediate_size == (len(plan.mlp.kept) if plan.mlp else whole.intermediate_size)
        head_dim = layers[index].get_submodule(case.family.attention.output).in_features // left.num_attention_heads
        assert head_dim == dense.hidden_size // dense.num_attention_heads
        for branch, has_bias in (
            (case.family.attention, config.attention_output_bias_per_layer[index]),
            (case.family.mlp, config.mlp_output_bias_per_layer[index]),
        ):
            assert (layers[index].get_submodule(branch.output).bias is not None) == has_bias
    for name in ("model_type", "num_attention_heads", "num_hidden_layers", case.family.intermediate_size):
        assert getattr(config, name) == getattr(before, name)


@each_case
def test_a_layer_with_one_kv_group_keeps_it(case: Case, runs_of: RunsOf) -> None:
    config = Checkpoint.open(runs_of(case).once.output).config
    single = [index for index in range(3) if layer_shape(config, index).num_attention_units == 1]
    assert single
    assert not any(plans(runs_of(case).twice)[index].attention for index in single)


@each_case_that_keeps_its_inputs
def test_the_second_plan_counts_the_units_of_the_first_and_both_compose(case: Case, runs_of: RunsOf) -> None:
    dense, twice = (Checkpoint.open(directory) for directory in (runs_of(case).dense, runs_of(case).twice.output))
    assert any(first and second for _, _, first, second in branches(case, runs_of(case)))
    for layer, branch, first, second in branches(case, runs_of(case)):
        shape = layer_shape(dense.config, layer)
        num_units = shape.num_key_value_heads if branch is case.family.attention else shape.intermediate_size
        once = first.kept if first else tuple(range(num_units))
        assert second is None or second.num_units == len(once)
        both = tuple(once[unit] for unit in second.kept) if second else once
        whole, left = dense.read_layer(layer), twice.read_layer(layer)
        for name in branch.input_weights:
            rows = branch.kept_rows(len(whole[name]), whole[branch.output_weight].shape[1], both, num_units)
            assert torch.equal(left[name], whole[name][rows])


@each_case_that_keeps_its_inputs
def test_an_output_bias_stays_and_is_corrected_by_the_mean_of_what_goes(
    case: Case, runs_of: RunsOf, ids: Tensor
) -> None:
    """Both recoveries keep the mean of a branch's output over the tokens that it was solved on."""
    once, twice = load(runs_of(case).once.output), load(runs_of(case).twice.output)
    # gram sees what enters the branches of the model as it was, the paper's method what the layers before leave.
    entering = inputs_of_branches(once if case.second == "gram" else twice, case.family, ids)
    corrected = 0
    for layer, branch, first, second in branches(case, runs_of(case)):
        before, after = (model.get_submodule(f"{case.family.layers}.{layer}") for model in (once, twice))
        bias, new_bias = (module.get_submodule(branch.output).bias for module in (before, after))
        if second is None:
            assert new_bias is bias is None or torch.equal(new_bias, bias)
            continue
        expected, found = (
            run_module(module.get_submodule(branch.module), *entering[layer, branch.module])
            for module in (before, after)
        )
        torch.testing.assert_close(found.mean(dim=(0, 1)), expected.mean(dim=(0, 1)), rtol=1e-4, atol=1e-4)
        if first is not None:
            assert not torch.allclose(new_bias, bias, atol=1e-2)
            corrected += 1
    assert corrected


@torch.inference_mode()
def inputs_of_branches(model: PreTrainedModel, family: Family, ids: Tensor) -> dict[tuple[int, str], Any]:
    """Return the arguments and keywords that every branch of every layer is called with."""
    seen: dict[tuple[int, str], Any] = {}
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for branch in (family.attention, family.mlp):

            def note(module: nn.Module, args: Any, kwargs: Any, key: tuple[int, str] = (index, branch.module)) -> None:
                seen[key] = args, kwargs

            layer.get_submodule(branch.module).register_forward_pre_hook(note, with_kwargs=True)
    model(ids, use_cache=False)
    return seen


@torch.inference_mode()
def run_module(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.slow
def test_refining_brings_it_nearer_to_what_the_first_left(runs_of: RunsOf, ids: Tensor) -> None:
    plain, refined = runs_of(NOT_REFINED), runs_of(replace(NOT_REFINED, refine=True))
    once = logits(load(plain.once.output), ids)
    before, after = ((logits(load(run.twice.output), ids) - once).square().mean() for run in (plain, refined))
    assert after < 0.9 * before


def test_all_load_where_the_package_is_not(runs_of: RunsOf, ids: Tensor, elsewhere: Elsewhere) -> None:
    for case in CASES:
        directory = Path(runs_of(case).twice.output)
        torch.testing.assert_close(elsewhere.logits(directory, ids), logits(load(directory), ids))
