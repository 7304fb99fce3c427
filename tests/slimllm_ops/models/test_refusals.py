"""What slimllm does not prune is refused by a reason that is true of transformers' classes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError
from slimllm_ops.models.config_checks import read_config
from slimllm_ops.models.families import family_named, is_supported
from slimllm_ops.models.refusals import REASONS
from tests.tiny import tiny_config

# What the modelling code of a type contains if a reason is true, by the reason's first words that no other has.
SIGNS = {
    "all heads share one latent": "kv_a_proj|kv_b_proj",
    "every token passes shared experts": "shared_expert|shared_mlp",
    "some layers have linear attention": "linear_attention|linear_attn|LightningAttention",
    "some layers are state-space": "[mM]amba|Rwkv|Rglru|[mM]LSTM",
    "some layers are convolutions": "ShortConv",
    "their linear maps are stored transposed": "Conv1D",
    "some layers read the keys and values of earlier": "kv_shared",
    "they read text in both directions": "Encoder|is_decoder|is_causal = False",
    "their experts have biases": r"gate_up_proj_bias[\s\S]*\[\.\.\., ::2\][\s\S]*self\.sinks",
    "their q_norm and k_norm can have": r"q_norm = CohereLayerNorm\(\s*hidden_size=\(config\.num_attention_heads, ",
    "their weights are ternary": "BitNet",
}


@pytest.mark.parametrize("model_type", REASONS)
def test_every_reason_is_true_of_transformers_code(model_type: str) -> None:
    assert not is_supported(model_type)
    assert model_type in CONFIG_MAPPING
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    code = "".join(path.read_text() for path in folder.glob("modeling_*.py"))
    (sign,) = (sign for begins, sign in SIGNS.items() if REASONS[model_type].startswith(begins))
    assert re.search(sign, code)


def test_the_reason_is_told_in_one_line() -> None:
    with pytest.raises(CheckpointError) as raised:
        family_named("gpt_oss")
    assert str(raised.value) == (
        "models of type 'gpt_oss' are not supported: their experts have biases, gate and up take turns by row, and "
        "every head has an attention sink (`slimllm families` lists those that are)"
    )


WRAPPERS: dict[str, tuple[dict[str, Any], str]] = {
    "of a family": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
        r"'gemma3' are for more than text, .*: save its text model, of type 'gemma3_text', alone, as docs/families\.md",
    ),
    "of what is refused": (
        {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
        r"its text model, of type 'qwen3_5_text', is not supported either: some layers have linear attention",
    ),
    "of what is unknown": (
        {"model_type": "wombat", "text_config": {"model_type": ["x"]}},
        r"'wombat' are for .* of type \['x'\], is not supported either$",
    ),
    "without a text model of its own": (
        {"model_type": "phi4_multimodal", "vision_config": {}, "audio_config": {}},
        "'phi4_multimodal' are for more than text, and slimllm prunes text models alone: pass a text model",
    ),
    "without a type": ({"text_config": {}}, "models of type None are for more than text"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_model_for_more_than_text_is_refused_by_what_it_holds(kind: str, tmp_path: Path) -> None:
    described, said = WRAPPERS[kind]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=said) as raised:
        read_config(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_settings_for_pictures_do_not_keep_a_text_model_from_being_read(tmp_path: Path) -> None:
    settings = tiny_config(family_named("gemma3_text")).to_dict() | {"vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings, default=str))
    assert read_config(tmp_path)[0].model_type == "gemma3_text"


EYES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}


def seeing(model_type: str) -> PreTrainedModel:
    """Return a random model for pictures and text."""
    torch.manual_seed(0)
    text = tiny_config(family_named(model_type)).to_dict()
    if model_type == "gemma3_text":
        eyes = {"model_type": "siglip_vision_model"} | EYES
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=90)
        )
    eyes = {"model_type": "pixtral"} | EYES
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eyes, image_token_index=90))


@pytest.mark.parametrize("model_type", ["gemma3_text", "ministral3"])
def test_the_text_model_that_docs_tell_to_save_is_the_whole_models(
    model_type: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    seeing(model_type).save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=f"save its text model, of type '{model_type}', alone"):
        Checkpoint.open(tmp_path / "whole")
    lines = (
        (Path(__file__).parents[3] / "docs" / "families.md").read_text().partition("## Models for more than text")[2]
    )
    program = lines.partition("```python\n")[2].partition("```")[0]
    assert "AutoModelForImageTextToText" in program
    program = program.replace('"google/gemma-3-4b-it"', repr(str(tmp_path / "whole")))
    exec(program.replace('"gemma-3-4b-text"', repr(str(tmp_path / "text"))), {})
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.inference_mode():
        assert torch.equal(text(ids[:2]).logits, whole(input_ids=ids[:2]).logits)
    assert Checkpoint.open(tmp_path / "text").config.model_type == model_type
