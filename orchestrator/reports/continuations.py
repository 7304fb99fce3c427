"""Lets a dense model and those pruned from it continue the same texts, for a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.inputs import resolve_recorded
from orchestrator.progress import Reporter
from orchestrator.reports.parts import Continuation
from orchestrator.reports.values import ReportedRun
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tokenizer import load_tokenizer
from slimllm_ops.checkpoint.whole import read_whole
from slimllm_ops.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As many tokens each model adds.
NEW_TOKENS = 40


def continue_prompts(runs: Sequence[ReportedRun], prompts: Sequence[str], reporter: Reporter) -> list[Continuation]:
    """Return each prompt with what the dense model and each pruned one make of it, one model in memory at a time.

    Raises:
        InputError: There is no checkpoint on this machine, or the dense model is gone, is another, or has no tokenizer.
    """
    checkpoints = [(run.label, run.directory) for run in runs if run.directory is not None]
    if not checkpoints:
        raise InputError("no model is at hand to continue a text: pass the directory of a checkpoint, or no --continue")
    dense = find_dense(runs)
    texts = []
    for label, directory in [("dense", dense), *checkpoints]:
        with reporter.timed(f"continuing, {label}"):
            texts.append((label, _continue(directory, prompts)))
    return [
        Continuation(prompt, tuple((label, found[number]) for label, found in texts))
        for number, prompt in enumerate(prompts)
    ]


def find_dense(runs: Sequence[ReportedRun]) -> Path:
    """Return the directory of the dense model that all runs pruned.

    Raises:
        InputError: They pruned several models; or the model is gone, or has other weights.
    """
    asked = {str(run.params.get("model_digest")): run.params for run in runs if run.directory is not None}
    if len(asked) > 1:
        raise InputError(
            "--continue shows one dense model beside those pruned from it, and the runs have several: pass fewer"
        )
    ((expected, params),) = asked.items()
    named = str(params.get("model"))
    try:
        directory = resolve_recorded(named, params.get("revision"))
        found = Checkpoint.open(directory).digest()
    except InputError as error:
        raise InputError(f"the dense model {named} cannot be read: {error}; leave out --continue") from error
    if found != expected:
        raise InputError(
            f"{named} has the weights {found[:12]}, and the run pruned {expected[:12]}: put the model that was pruned "
            "there, or leave out --continue"
        )
    return directory


def _continue(directory: Path, prompts: Sequence[str]) -> list[str]:
    """Return what a model adds to each prompt."""
    try:
        tokenizer, model = load_tokenizer(directory), read_whole(directory, torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory} cannot be loaded to continue a text ({str(error).splitlines()[0]}): it needs weights and a "
            "tokenizer"
        ) from error
    return [_add_to(prompt, model.eval(), tokenizer) for prompt in prompts]


def _add_to(prompt: str, model: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    # Alone, the new tokens may lose the space before the first word.
    whole, begun = (str(tokenizer.decode(one, skip_special_tokens=True)) for one in (written[0], ids[0]))
    return whole.removeprefix(begun)
