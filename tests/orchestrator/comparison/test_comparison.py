"""Comparisons of a random model, on a real local Ray and a real MLflow store."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.group import ShardGroup
from orchestrator import CompareConfig, compare
from orchestrator.cli import main
from orchestrator.cli.summary import print_comparison
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.table import Row, as_markdown, gap_fraction, print_table, write_table
from orchestrator.config import ConfigError
from orchestrator.progress import Reporter
from slimllm_ops.allocate.budget import spend_evenly
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import InputError
from slimllm_ops.methods import METHODS, Method, leave
from slimllm_ops.models.families import Branch
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking

# hidden_size 32: a channel is a row of gate and up, and a column of down.
CHANNEL = 3 * 32
SPARSITIES = (0.2, 0.5)
# Of the random model with grouped queries: attention (q and o 32 x 32, k and v 32 x 16), MLP 48 channels, norms.
LAYERS = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 48 * CHANNEL + 2 * 32)

Compare = Callable[..., Comparison]


@pytest.fixture(scope="session")
def own_blocks(gqa_model: Path, held_out_blocks: np.ndarray) -> Tensor:
    """Return blocks that the random model itself wrote: it knows them better than any pruned one does."""
    model = AutoModelForCausalLM.from_pretrained(gqa_model)
    ids = torch.from_numpy(held_out_blocks[:, :4]).long()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)


@pytest.fixture(scope="session")
def own_file(own_blocks: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "own.parquet"
    pq.write_table(pa.table({"input_ids": own_blocks.tolist()}), path)
    return path


@pytest.fixture(scope="session")
def run_comparison(
    tracking_uri: str,
    gqa_model: Path,
    token_file: Path,
    own_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compare:
    """Compare on the random model with grouped queries, quietly."""

    def run(**settings: Any) -> Comparison:
        defaults = {
            "model": str(gqa_model),
            "calibration": str(token_file),
            "evaluate": (str(own_file),),
            "tracking_uri": tracking_uri,
            "local": True,
            "output": str(tmp_path_factory.mktemp("comparison") / "out"),
        }
        return compare(CompareConfig(**{**defaults, **settings}), Reporter(Console(file=io.StringIO())))

    return run


@pytest.fixture(scope="session")
def passes() -> list[tuple[str, int, str]]:
    """Return what was observed while `everything` ran: stream, layer and module."""
    return []


@pytest.fixture(scope="session")
def everything(run_comparison: Compare, passes: list[tuple[str, int, str]]) -> Comparison:
    """All methods and one of a user's own, at two sparsities."""

    # Defined in here, it travels to the workers by value, as from a user's own script.
    def keep_the_first(projection: Projection, num_units: int) -> Ranking:
        return Ranking(tuple(reversed(range(num_units))), (1.0,) * num_units)

    def count(self: ShardGroup, name: str, step: Callable[..., Any], layer: int, *arguments: Any) -> Any:
        passes.extend((name, layer, one.module) for one in arguments if isinstance(one, Branch))
        return merge(self, name, step, layer, *arguments)

    merge = ShardGroup.merge

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "mine", Method("mine", keep_the_first, spend_evenly, leave, "a user", "all"))
        patch.setattr(ShardGroup, "merge", count)
        return run_comparison(sparsity=SPARSITIES)


def test_every_method_takes_part_at_every_sparsity_and_the_dense_model_comes_first(everything: Comparison) -> None:
    methods = [
        "slimllm",
        "gram",
        "gram-refine",
        "flap",
        "fasp",
        "ziplm",
        "modegpt",
        "slimgpt",
        "wanda-sp",
        "magnitude",
        "random",
        "mine",
    ]
    assert [row.method for row in everything.rows] == ["dense", *(name for name in methods for _ in SPARSITIES)]
    assert all(row.source for row in everything.rows)


def test_all_methods_leave_the_asked_sparsity_to_within_a_channel(everything: Comparison) -> None:
    for number, sparsity in enumerate(SPARSITIES):
        for row in everything.rows[1:][number :: len(SPARSITIES)]:
            assert 0 <= sparsity - row.sparsity < CHANNEL / LAYERS, row.method
            assert everything.rows[0].parameters - row.parameters == round(row.sparsity * LAYERS)


def test_one_pass_over_the_dense_model_serves_all_one_pass_methods(
    everything: Comparison, passes: list[tuple[str, int, str]]
) -> None:
    dense = [(layer, module) for name, layer, module in passes if name == "dense"]
    assert dense == [(layer, module) for layer in range(3) for module in ("self_attn", "mlp")]
    assert {name for name, _, _ in passes} == {"dense", "pruned", "refined"}


def test_losses_and_gaps_follow_from_the_perplexities(everything: Comparison) -> None:
    dense = everything.rows[0]
    assert dense.gap == dense.sparsity == 0
    for number in range(len(SPARSITIES)):
        slimllm, *others = everything.rows[1:][number :: len(SPARSITIES)]
        assert slimllm.gap == 1
        for row in others:
            assert row.loss == pytest.approx(math.log(row.perplexity))
            assert row.gap == pytest.approx((row.loss - dense.loss) / (slimllm.loss - dense.loss))
            assert row.seconds > 0
    assert len({row.perplexity for row in everything.rows}) == len(everything.rows)


def test_tables_and_figure_are_written_and_no_checkpoint_stays(everything: Comparison) -> None:
    names = {path.name for path in everything.output.iterdir()}
    tables = {"comparison.json", "comparison.csv", "comparison.md", "perplexity.png", "report.html"}
    assert names == tables | {"metrics.jsonl", "run.toml", "complete.json"}
    document = json.loads((everything.output / "comparison.json").read_text())
    assert [Row(**row) for row in document["rows"]] == list(everything.rows)
    assert document["calibration_tokens"] == 24 * 16
    assert document["params"]["methods"].startswith("slimllm, gram, gram-refine, flap")
    table = list(csv.DictReader((everything.output / "comparison.csv").open()))
    assert [float(row["perplexity"]) for row in table] == [row.perplexity for row in everything.rows]
    assert (everything.output / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_has_a_child_for_every_model_and_the_files_at_the_parent(
    everything: Comparison, tracking_uri: str
) -> None:
    client = MlflowClient(tracking_uri=tracking_uri)
    children = client.search_runs([everything.experiment_id], f"tags.`mlflow.parentRunId` = '{everything.run_id}'")
    by_name = {run.info.run_name: run for run in children}
    rows = everything.rows[1:]
    asked = [f"{row.method}-sparsity-{SPARSITIES[n % 2]:.2f}" for n, row in enumerate(rows)]
    assert sorted(by_name) == sorted(asked)
    for name, row in zip(asked, rows, strict=True):
        data = by_name[name].data
        assert by_name[name].info.status == "FINISHED"
        assert data.params["method"] == row.method
        assert data.params["source"] == row.source
        for metric in ("sparsity", "parameters_after", "perplexity_after", "loss_after", "gap", "seconds"):
            assert data.metrics[metric] == pytest.approx(getattr(row, metric.removesuffix("_after"))), (name, metric)
        assert "channels_kept" in data.metrics
    parent = client.get_run(everything.run_id)
    assert parent.data.metrics["perplexity_before"] == pytest.approx(everything.rows[0].perplexity)
    assert parent.data.metrics["calibration_seconds"] > 0
    assert parent.data.tags["mlflow.note.content"] == (everything.output / "comparison.md").read_text()
    logged = {file.path for file in client.list_artifacts(everything.run_id)}
    assert logged == {"comparison.json", "comparison.csv", "comparison.md", "perplexity.png", "report.html"}
    assert not [file for run in children for file in client.list_artifacts(run.info.run_id)]


def test_a_refined_model_is_not_the_one_it_was_refined_from(everything: Comparison) -> None:
    gram, refined = (
        [row.perplexity for row in everything.rows if row.method == name] for name in ("gram", "gram-refine")
    )
    assert all(one != other for one, other in zip(gram, refined, strict=True))


def test_the_end_of_a_run_is_a_table_and_the_paths(everything: Comparison) -> None:
    text = io.StringIO()
    print_comparison(everything, Console(file=text, width=100))
    for row in everything.rows:
        assert f"{row.method} " in text.getvalue()
        assert f"{row.perplexity:,.3f}" in text.getvalue()
    assert str(everything.output) in text.getvalue()
    assert everything.run_id in text.getvalue()


@pytest.fixture(scope="module")
def by_ratio(run_comparison: Compare) -> Comparison:
    """The paper's own settings, with the checkpoints kept."""
    settings = {"ratio": 0.4, "pruned_layers": 2, "alpha": 1.0}
    return run_comparison(methods=("flap", "gram-refine"), keep_checkpoints=True, **settings)


def test_with_the_paper_s_ratio_all_remove_what_slimllm_removes(by_ratio: Comparison) -> None:
    _, slimllm, *others = by_ratio.rows
    assert [row.method for row in others] == ["gram-refine", "flap"]
    plan = Plan.read(by_ratio.output / "checkpoints" / "slimllm-ratio-0.4" / "pruning" / "plan.json")
    assert [layer.attention is None for layer in plan.layers].count(True) == 1
    for row in others:
        assert 0 <= row.parameters - slimllm.parameters < CHANNEL


@torch.inference_mode()
def test_a_kept_checkpoint_is_the_model_that_was_measured(by_ratio: Comparison, own_blocks: Tensor) -> None:
    directories = sorted((by_ratio.output / "checkpoints").iterdir())
    rows = {row.method: row for row in by_ratio.rows}
    assert [path.name.partition("-sparsity-")[0] for path in directories] == [
        "flap",
        "gram-refine",
        "slimllm-ratio-0.4",
    ]
    for directory in directories:
        row = rows[directory.name.partition("-sparsity-")[0].removesuffix("-ratio-0.4")]
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert sum(weight.numel() for weight in model.parameters()) == row.parameters
        assert float(model(own_blocks, labels=own_blocks).loss) == pytest.approx(row.loss, rel=1e-4)
        assert (directory / "pruning" / "importance.parquet").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("gram", "magic")}, r"method 'magic' is unknown: choose among slimllm, gram, gram-refine, flap"),
        ({"evaluate": ()}, r"nothing to compare by: pass held-out .* --evaluate"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    run_comparison: Compare, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_comparison(output=str(tmp_path / "out"), **settings)
    assert not list(tmp_path.iterdir())


def test_a_sparsity_out_of_reach_leaves_nothing_behind(run_comparison: Compare, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sparsity 0.99 is not reachable"):
        run_comparison(output=str(tmp_path / "out"), sparsity=0.99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gram"}, "method is a setting of prune"),
        ({"refine": True}, "refine is a setting of prune"),
        ({"register": "a"}, "register is a setting of prune"),
        ({"moments": "a"}, "moments is a setting of prune"),
        ({"methods": ("flap", "flap")}, "a method was given twice"),
        ({"sparsity": 0.2, "ratio": 0.2}, "sparsity and ratio were both given"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "slimllm: method 'magic' is unknown"),
        (["--method", "flap", "--method", "flap"], "slimllm: a method was given twice"),
        (["--sparsity", "1.5"], "slimllm: sparsity is 1.5"),
        (["--ratio", ".2", "--sparsity", ".2"], "slimllm: sparsity and ratio were both given"),
        (["--config", "missing.toml"], "slimllm: config file missing.toml does not exist"),
    ],
)
def test_bad_options_end_in_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_config_file_may_name_the_methods(tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text('methods = ["magic"]\nkeep-checkpoints = true\n')
    result = CliRunner().invoke(main, ["compare", "--config", str(path)])
    assert (result.exit_code, "method 'magic' is unknown" in result.stderr) == (2, True)


def row(method: str, data: str = "a.txt", **values: Any) -> Row:
    defaults: dict[str, Any] = {
        "source": "|W| |X|",
        "sparsity": 0.0 if method == "dense" else 0.2,
        "parameters": 1000,
        "tokens": 160,
        "block_length": 16,
        "perplexity": 10.0,
        "loss": math.log(10),
        "gap": 0.5,
        "seconds": 1.0,
    }
    return Row(method=method, data=data, **{**defaults, **values})


HEADER = {"model": "m", "calibration": "c", "calibration_tokens": 1234, "calibration_seconds": 5.0}


def test_a_gap_is_a_fraction_of_the_reference_s() -> None:
    assert gap_fraction(1.5, 1.0, 3.0) == 0.25
    assert gap_fraction(0.5, 1.0, 3.0) == -0.25
    for nothing in (gap_fraction(1.5, 1.0, 1.0), gap_fraction(1.5, 1.0, 0.9), gap_fraction(math.inf, 1.0, 3.0)):
        assert math.isnan(nothing)


def test_what_is_not_finite_is_null_in_json_and_does_not_break_the_figure(tmp_path: Path) -> None:
    broken = row("random", perplexity=math.inf, loss=math.inf, gap=math.nan)
    write_table([row("dense"), broken], [], HEADER, tmp_path)
    read = json.loads((tmp_path / "comparison.json").read_text())["rows"][1]
    assert (read["perplexity"], read["loss"], read["gap"]) == (None, None, None)
    assert "| inf | inf | - |" in (tmp_path / "comparison.md").read_text()


def test_every_set_of_held_out_blocks_has_a_table_and_a_figure(tmp_path: Path) -> None:
    rows = [row("dense"), row("dense", "b.txt"), row("flap"), row("flap", "b.txt", perplexity=20.0)]
    write_table(rows, [], HEADER, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert text.index("## a.txt") < text.index("10.000") < text.index("## b.txt") < text.index("20.000")
    assert (tmp_path / "perplexity.png").is_file()
    assert (tmp_path / "perplexity-1.png").is_file()
    shown = io.StringIO()
    print_table(rows, [], Console(file=shown, width=100))
    assert shown.getvalue().index("a.txt") < shown.getvalue().index("b.txt")


def test_a_bar_in_a_source_does_not_break_the_markdown_table() -> None:
    table = [line for line in as_markdown([row("dense"), row("flap")], HEADER).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
