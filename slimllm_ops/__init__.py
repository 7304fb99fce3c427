"""The mathematics of structured pruning and the models it is done to; no Ray, no MLflow.

Importing the package registers the pruned models' classes, so that their checkpoints load without remote code.
"""

from slimllm_ops.models.families import FAMILIES
from slimllm_ops.models.pruned import register

for _family in FAMILIES:
    register(_family.pruned)
