"""Answers lm-eval's requests with a whole model, by lm-eval's own class for models of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimllm_ops.checkpoint.tokenizer import load_tokenizer
from slimllm_ops.evaluation.reading import read_on

# An extra, which takes seconds to import.
if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class AnsweringStream:
    """A model that answers requests.

    Args:
        directory: The model's directory.
        device: Where it runs, in float32 on a CPU and in bfloat16 on a GPU.
        batch_size: The requests that it passes at once.
    """

    def __init__(self, directory: Path, device: torch.device, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        model = read_on(directory, device)
        self._model = HFLM(pretrained=model, tokenizer=load_tokenizer(directory), batch_size=batch_size)

    def answer(self, asked: "tuple[Callable[..., list[Any]], list[Instance]]") -> list[Any]:
        """Return the answers to requests, in their order.

        Args:
            asked: The method of lm-eval's class that answers this kind of request, such as `HFLM.loglikelihood`, and
                the requests.
        """
        ask, requests = asked
        return ask(self._model, requests, disable_tqdm=True) if requests else []

    def close(self) -> None:
        """Free all memory now."""
        del self._model
