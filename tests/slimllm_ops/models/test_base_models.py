"""The base class of each family (`AutoModel`) has the pruned layers too; servers build it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from slimllm_ops.models.families import FAMILIES, Family, family_named
from slimllm_ops.models.skeleton import build_on_meta
from tests.slimllm_ops.pruned import write_uneven

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_gives_the_states_before_the_head(family: Family, tmp_path: Path) -> None:
    directory = write_uneven(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    base, report = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert type(base) is family.pruned_base
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert report["unexpected_keys"] <= {"lm_head.weight", "embed_out.weight"}
    with torch.inference_mode():
        found, expected = base.eval()(IDS).last_hidden_state, whole.base_model(IDS).last_hidden_state
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_config_alone_gives_its_shapes(family: Family, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_uneven(family, tmp_path))
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    expected = {name: tensor.shape for name, tensor in build_on_meta(config).base_model.named_parameters()}
    assert {name: tensor.shape for name, tensor in base.named_parameters()} == expected


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_what_is_saved_again_names_both_classes(auto: Any, tmp_path: Path) -> None:
    auto.from_pretrained(write_uneven(family_named("qwen3"), tmp_path)).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "pruned_qwen3.PrunedQwen3Config",
        "AutoModel": "pruned_qwen3.PrunedQwen3Model",
        "AutoModelForCausalLM": "pruned_qwen3.PrunedQwen3ForCausalLM",
    }
    assert sorted(path.name for path in (tmp_path / "saved").glob("*.py")) == ["pruned_layers.py", "pruned_qwen3.py"]
