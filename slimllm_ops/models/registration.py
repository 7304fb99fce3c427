"""Registers pruned models with transformers' auto classes, so that their checkpoints load without remote code.

Importing the pruned classes of all families takes seconds, and most processes need one or none. So transformers' table
of configs gets a stand-in for each family, which imports the family's file when a config of that type is read. A
process that never imports transformers' auto classes registers nothing.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import wrapt

from slimllm_ops.models.families import Family
from slimllm_ops.models.transformers_private import CONFIG_TABLE


class _ImportedOnUse(type):
    """The metaclass of a stand-in for a config class; calling it or reading an attribute imports the real class."""

    family: Family

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.family.pruned.config_class(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.family.pruned.config_class, name)


def register_families(families: Iterable[Family]) -> None:
    """Register the pruned models of families with transformers' auto classes, now or once those are imported."""
    for family in families:
        _register_when_imported(family)


def _register_when_imported(family: Family) -> None:
    """Register a family's stand-in when the table of configs is imported, and its classes when their file is."""

    def register_stand_in(module: ModuleType) -> None:
        stand_in = _ImportedOnUse(f"Pruned{family.name}Config", (), {"family": family, "__module__": family.module})
        module.AutoConfig.register(f"pruned_{family.model_type}", stand_in, exist_ok=True)

    def register_classes(module: ModuleType) -> None:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        config = family.pruned.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        # With this, `save_pretrained` of a loaded model copies the model files again.
        config.register_for_auto_class()
        pairs: tuple[tuple[Any, Any], ...] = ((AutoModel, family.pruned_base), (AutoModelForCausalLM, family.pruned))
        for auto, pruned in pairs:
            auto.register(config, pruned, exist_ok=True)
            pruned.register_for_auto_class(auto.__name__)

    wrapt.register_post_import_hook(register_stand_in, CONFIG_TABLE)
    wrapt.register_post_import_hook(register_classes, family.module)
