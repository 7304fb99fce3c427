"""`slimllm export OUTPUT --to deci`: equal heads, channels by 256, no biases; otherwise a refusal that says why."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from orchestrator.cli import main
from slimllm_ops.models.families import family_named
from slimllm_ops.models.pruned.decilm import DeciLMConfig, DeciLMForCausalLM, block_config, channels_of
from tests.elsewhere import Elsewhere
from tests.slimllm_ops.pruned import write_even_heads, write_uneven

IDS = torch.arange(20)[None]


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", "--to", "deci", *map(str, arguments)])


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_it_computes_what_the_pruned_model_does(model_type: str, tmp_path: Path) -> None:
    source = write_even_heads(family_named(model_type), tmp_path, [512, 256, 768])
    done = export(source)
    assert done.exit_code == 0, done.output
    written = source.with_name("pruned-deci")
    config = json.loads((written / "config.json").read_text())
    # What servers read: heads and head width of the whole model, and the widths of each layer.
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert [one["attention"] for one in config["block_configs"]] == [{"no_op": False, "n_heads_in_group": 2}] * 3
    assert "intermediate_size_per_layer" not in config
    loaded, report = DeciLMForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(report.values())
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(IDS).logits
        assert torch.equal(loaded.eval()(IDS).logits, expected)


@pytest.mark.slow
def test_it_loads_where_slimllm_is_not_installed(tmp_path: Path, elsewhere: Elsewhere) -> None:
    source = write_even_heads(family_named("llama"), tmp_path, [512, 256, 768])
    assert export(source).exit_code == 0
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(IDS).logits
    torch.testing.assert_close(elsewhere.logits(source.with_name("pruned-deci"), IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [32, 96, 576, 4096, 5120, 7168])
def test_a_width_is_what_servers_compute_from_it(hidden: int) -> None:
    for channels in range(256, 28672, 256):
        assert channels_of(block_config(8, 2, channels, hidden), hidden) == channels


def test_saving_it_again_changes_no_setting(tmp_path: Path) -> None:
    source = write_even_heads(family_named("llama"), tmp_path, [512, 256, 768])
    assert export(source).exit_code == 0
    config = DeciLMConfig.from_pretrained(source.with_name("pruned-deci"))
    config.save_pretrained(tmp_path / "again")
    again = DeciLMConfig.from_pretrained(tmp_path / "again")
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.block_configs[1].ffn.no_op is False


@pytest.mark.parametrize(
    ("model_type", "channels", "why"),
    [
        ("qwen2", [256, 256, 256], "Qwen2 is not a Llama in its layers; supported: llama, mistral"),
        ("llama", [256, 250, 256], "layer 1 has 250 channels, not a multiple of 256: prune with --uniform-heads"),
    ],
)
def test_what_is_no_decilm_is_refused(model_type: str, channels: list[int], why: str, tmp_path: Path) -> None:
    done = export(write_even_heads(family_named(model_type), tmp_path, channels))
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    assert why in done.output
    assert [path.name for path in tmp_path.iterdir() if "deci" in path.name] == []


def test_layers_that_differ_in_heads_are_refused(tmp_path: Path) -> None:
    done = export(write_uneven(family_named("llama"), tmp_path, intermediate_size=256))
    assert done.exit_code == 2
    assert "layer 0 has" in done.output or "differ in heads" in done.output
