"""The files that a run writes beside the weights have the same bytes each time, wherever the run writes them."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from orchestrator.pipeline import PruneResult
from orchestrator.record.mlflow import log_layer
from orchestrator.tracking import TrackingOptions, tracked_run
from orchestrator.tracking.journal import Journal
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Plan
from tests.conftest import OF_TIME


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Other settings of these are of where a run goes, and change nothing of what it gives.
ELSEWHERE = {"run_name": "again", "experiment": "another", "register": "again", "offload": True, "overwrite": True}


def assert_same_but_for_the_time(first: Path, second: Path) -> None:
    one, other = files_of(first), files_of(second)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name] and not name.endswith(OF_TIME)} == set()


def test_a_second_run_of_the_papers_method_gives_the_same_bytes(
    gqa_run: PruneResult,
    prune_model: Callable[..., PruneResult],
    cpus_of_ray: None,
    gqa_model: Path,
    held_out_file: Path,
    tracking_uri: str,
) -> None:
    evaluate = (str(held_out_file),)
    again = prune_model(gqa_model, rendered=True, evaluate=evaluate, tracking_uri=tracking_uri, workers=1, **ELSEWHERE)
    assert_same_but_for_the_time(gqa_run.output, again.output)


def test_a_second_run_of_gram_gives_the_same_bytes(
    prune_model: Callable[..., PruneResult], gqa_model: Path, held_out_file: Path, tracking_uri: str
) -> None:
    asked: dict[str, Any] = {"method": "gram", "refine": True, "rendered": True, "evaluate": (str(held_out_file),)}
    # Where MLflow is told and where it is not.
    logged = ELSEWHERE | {"tracking_uri": tracking_uri}
    first, second = (prune_model(gqa_model, **asked, **places) for places in ({}, logged))
    assert_same_but_for_the_time(first.output, second.output)


def test_the_plan_has_no_figure_of_the_machine(gqa_run: PruneResult) -> None:
    totals = json.loads((gqa_run.output / "pruning" / "plan.json").read_text())["totals"]
    assert {"sparsity", "parameters_after", "perplexity", "calibration_tokens"} <= totals.keys()
    assert not {"seconds", "peak_memory", "tokens_per_second"} & totals.keys()


def test_a_layer_that_an_earlier_attempt_logged_is_not_logged_again(
    gqa_run: PruneResult, gqa_model: Path, tracking_uri: str, tmp_path: Path
) -> None:
    source, layers = Checkpoint.open(gqa_model), Plan.read(gqa_run.output / "pruning" / "plan.json").layers
    options, journal = TrackingOptions(tracking_uri=tracking_uri), tmp_path / "metrics.jsonl"
    for until in (2, 3):
        with suppress(KeyboardInterrupt), tracked_run(options, journal) as run:
            for number in range(until):
                log_layer(run, source, number, layers[number])
            raise KeyboardInterrupt
    assert [event["step"] for event in Journal.read(journal) if event["event"] == "metrics"] == [0, 1, 2]


def test_the_logged_model_has_the_files_of_the_output(gqa_run: PruneResult, tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    (output,) = client.get_run(str(gqa_run.run_id)).outputs.model_outputs
    place = client.get_logged_model(output.model_id).artifact_location
    logged, left = files_of(Path(place.removeprefix("file://"))), files_of(gqa_run.output)
    # The mark is written when all is done.
    assert left.keys() - logged.keys() == {"complete.json"}
    assert logged.keys() - left.keys() == set()
    assert [name for name in logged if logged[name] != left[name]] == ["pruning/metrics.jsonl"]
