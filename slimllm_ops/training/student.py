"""Reads the model to train and its teacher, in the dtype that the training needs; puts adapters on the model."""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from slimllm_ops.checkpoint.whole import read_whole
from slimllm_ops.training.job import LoRA, TrainingJob


def read_student(job: TrainingJob) -> nn.Module:
    """Return the model to train: all of it, or its adapters."""
    # If all parameters are trained, each needs its digits.
    model = read_whole(job.student, torch.float32 if job.lora is None else _frozen_dtype(job))
    model.config.use_cache = False
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if job.lora is None else add_adapters(model, job.lora, job.seed)


def add_adapters(model: PreTrainedModel, lora: LoRA, seed: int) -> nn.Module:
    """Return a model with untrained adapters, whose other parameters are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.modules), bias="none", task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def read_teacher(directory: Path, job: TrainingJob) -> PreTrainedModel:
    """Return the teacher, on the device that the worker computes on."""
    model = read_whole(directory, _frozen_dtype(job)).requires_grad_(False).eval()
    model.config.use_cache = False
    return cast(PreTrainedModel, nn.Module.to(model, "cuda")) if job.on_gpu else model


def _frozen_dtype(job: TrainingJob) -> torch.dtype:
    """Return the dtype of parameters that are not trained."""
    return torch.bfloat16 if job.on_gpu else torch.float32
