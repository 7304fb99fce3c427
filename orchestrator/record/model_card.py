"""Writes the README.md of a pruned checkpoint: what it is, how to load it, and what pruning cost."""

from pathlib import Path
from typing import Any

from orchestrator.inputs import Inputs
from orchestrator.secrets import uris_masked
from slimllm_ops.files import write_text

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, slimllm]
---

# {name}, pruned by {sparsity:.1%}

Pruned with [slimllm](https://arxiv.org/abs/2505.22689) (method `{method}`), which removes attention heads and MLP
channels layer by layer and refits the remaining weights. It loads in plain transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this directory>", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("<this directory>", config=model.config)
```

`trust_remote_code=True` lets transformers load the two small model files in the checkpoint (`pruned_*.py`), which
slimllm wrote; no other code is in it. You do not need it if slimllm is installed and your code imports `slimllm_ops`.

vLLM 0.28 and later serves it as it is, with a KV cache as small as the heads of each layer:
`vllm serve <this directory> --trust-remote-code`. For llama.cpp and others, `slimllm export` writes other forms.

| | before | after |
|---|---|---|
| parameters | {parameters_before:,} | {parameters_after:,} |
| parameters of the decoder layers | {layer_parameters_before:,} | {layer_parameters_after:,} |
| decoder layers | {layers_before} | {layers_after} |
{measured}
Calibrated on {tokens:,} tokens of `{calibration}`{generated} (digest `{digest}`), seed {seed}.
`pruning/plan.json` has every decision and setting; `pruning/importance.parquet` has the importance of every unit.
"""


def write_model_card(directory: Path, inputs: Inputs, params: dict[str, Any], totals: Any) -> None:
    """Write README.md into a checkpoint's directory."""
    rows = [
        f"| perplexity on `{spec}`, {totals.evaluated[spec]} | {dense:.2f} | {pruned:.2f} |\n"
        for spec, (dense, pruned) in totals.perplexity.items()
    ]
    rows += [f"| {after.name} | {before.value:.4f} | {after.value:.4f} |\n" for before, after in totals.tasks]
    card = CARD.format(
        name=inputs.name,
        sparsity=totals.sparsity,
        method=params["method"],
        parameters_before=totals.parameters_before,
        parameters_after=totals.parameters_after,
        layer_parameters_before=totals.layer_parameters_before,
        layer_parameters_after=totals.layer_parameters_after,
        layers_before=totals.layers_before,
        layers_after=totals.layers_after,
        measured="".join(rows),
        tokens=totals.calibration_tokens,
        calibration=inputs.calibration.spec,
        generated=_generated(inputs),
        digest=inputs.calibration.digest[:16],
        seed=params["seed"],
    )
    write_text(directory / "README.md", uris_masked(card))


def _generated(inputs: Inputs) -> str:
    """Return which of the calibration blocks the model sampled itself, if there are any."""
    number, all_blocks = inputs.calibration.generated, inputs.calibration.num_blocks
    return f", {number} of {all_blocks} sequences sampled by the model itself" if number else ""
