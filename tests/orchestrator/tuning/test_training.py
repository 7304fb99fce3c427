"""LoRA puts adapters on the projections that were pruned, and workers share batches equally."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import WorkerPlan
from orchestrator.config import ConfigError
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.inputs import TuneInputs, load_tune_inputs
from orchestrator.tuning.training import shared_batch, trained_modules
from orchestrator.tuning.tune import require_sharing
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def inputs(pruned: Path) -> TuneInputs:
    return load_tune_inputs(TuneConfig(checkpoint=str(pruned)), lambda text: None)


def test_adapters_are_on_what_was_pruned(inputs: TuneInputs) -> None:
    assert inputs.plan is not None
    first, second, third = inputs.plan.layers
    layers = (replace(first, mlp=None), LayerPlan(dropped=True), replace(third, attention=None), second)
    found = trained_modules(replace(inputs, plan=Plan(inputs.plan.header, layers)))
    attention = {f"model.layers.0.self_attn.{name}" for name in ATTENTION if first.attention}
    mlp = {f"model.layers.1.mlp.{name}" for name in MLP if third.mlp}
    of_second = {f"model.layers.2.self_attn.{name}" for name in ATTENTION if second.attention}
    of_second |= {f"model.layers.2.mlp.{name}" for name in MLP if second.mlp}
    assert set(found) == attention | mlp | of_second


def test_a_model_without_a_plan_is_trained_everywhere(inputs: TuneInputs) -> None:
    assert len(trained_modules(replace(inputs, plan=None))) == 3 * (len(ATTENTION) + len(MLP))


def test_where_nothing_takes_adapters_it_is_said(inputs: TuneInputs) -> None:
    with pytest.raises(InputError, match=r"no projection .* --full with --method distil"):
        trained_modules(replace(inputs, plan=Plan({}, (LayerPlan(),) * 3)))


def test_parameters_are_sharded_over_gpus_only() -> None:
    with pytest.raises(ConfigError, match="the workers have none"):
        require_sharing(TuneConfig(checkpoint="x", fsdp=True), WorkerPlan(2, 1, 0.0, weights_travel=False))


def test_workers_that_do_not_see_the_files_are_refused() -> None:
    apart = WorkerPlan(2, 1, 0.0, weights_travel=True)
    with pytest.raises(ConfigError, match="--shared-storage"):
        require_sharing(TuneConfig(checkpoint="x"), apart)
    require_sharing(TuneConfig(checkpoint="x", method="blocks"), apart)


@pytest.mark.parametrize(("workers", "fits"), [(1, True), (2, True), (3, False), (8, False)])
def test_workers_share_a_batch_equally(workers: int, fits: bool) -> None:
    config = TuneConfig(checkpoint="x", batch_size=8, micro_batch_size=2)
    check: Callable[[], int] = lambda: shared_batch(config, workers)  # noqa: E731
    if fits:
        assert check() == 8
        return
    with pytest.raises(ConfigError, match=f"batch_size 8 cannot be shared by {workers} workers with 2 sequences"):
        check()
