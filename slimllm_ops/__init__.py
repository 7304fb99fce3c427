"""Implements the mathematics of structured pruning and the models that it prunes; imports no Ray and no MLflow.

Importing the package lets transformers load pruned models without remote code (`models/registration.py`).
"""

from slimllm_ops.models.families import FAMILIES
from slimllm_ops.models.registration import register_families

register_families(FAMILIES)
