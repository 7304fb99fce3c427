"""The mathematics of structured pruning and the models it is done to; no Ray, no MLflow.

Importing the package registers the pruned models' classes, so that their checkpoints load without remote code.
"""

from slimllm_ops.families import FAMILIES
from slimllm_ops.pruned_models import register

for _family in FAMILIES:
    register(_family.pruned)
