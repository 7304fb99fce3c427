"""The mathematics of structured pruning and the models it is done to; no Ray, no MLflow.

Importing the package registers the pruned models' classes, so that their checkpoints load without remote code.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from slimllm_ops.pruned_model import PRUNED_MODELS

for _config, _model in PRUNED_MODELS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
