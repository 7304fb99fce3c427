"""Opens the streams of an evaluation, from token ids and the place where they run."""

from pathlib import Path

from torch import Tensor

from slimllm_ops.evaluation.answering import AnsweringStream
from slimllm_ops.evaluation.scoring import ScoringStream
from slimllm_ops.stream.opening import Workplace


def open_scoring(place: Workplace, batches: list[Tensor], directories: tuple[Path, ...]) -> ScoringStream:
    """Read whole models that score windows.

    Args:
        place: Where the models run.
        batches: Windows of token ids, each (w, T), int64.
        directories: The models' directories; the first is the reference.
    """
    return ScoringStream(directories, batches, place.device)


def open_answering(place: Workplace, batches: list[Tensor], directory: Path, batch_size: int) -> AnsweringStream:
    """Read a whole model that answers requests.

    Args:
        place: Where the model runs.
        batches: Nothing.
        directory: The model's directory.
        batch_size: The requests that it passes at once.
    """
    return AnsweringStream(directory, place.device, batch_size)
