"""Caches of a fixed size fit pruned models: transformers sizes them by the heads of each layer."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.slimllm_ops.pruned import write_uneven

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def pruned_model(family: Family, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(write_uneven(family, folder)).eval()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_static_cache_that_is_filled_in_chunks_gives_the_same_tokens(family: Family, tmp_path: Path) -> None:
    model = pruned_model(family, tmp_path)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **settings)
    assert expected.shape == (1, 11)
    chunked = model.generate(IDS, cache_implementation="static", prefill_chunk_size=2, **settings)
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_a_module_for_export_holds_a_static_cache(model_type: str, tmp_path: Path) -> None:
    model = pruned_model(family_named(model_type), tmp_path)
    expected = model(IDS, use_cache=False).logits
    sizes = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=sizes)
    exported = TorchExportableModuleWithStaticCache(model)
    torch.testing.assert_close(exported(input_ids=IDS, cache_position=torch.arange(5)), expected, rtol=1e-4, atol=1e-4)


def test_batches_with_one_cache_for_all_layers_are_refused(tmp_path: Path) -> None:
    model = pruned_model(family_named("llama"), tmp_path)
    said = "keeps 2 key/value heads for every layer, and the layers of this model have 1 to 2: use generate()"
    with pytest.raises(NotImplementedError, match=re.escape(said)):
        model.generate_batch([IDS[0].tolist()])
