"""Gives the sequences of a data set's folder to the trainer.

Shapes: T tokens in a sequence.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slimllm_ops.stream.padding import PADDING
from slimllm_ops.training.job import read_data
from slimllm_ops.training.losses import IGNORED


class Sequences(Dataset):
    """The sequences of a data set's folder, as the trainer reads them."""

    def __init__(self, folder: Path) -> None:
        self._ids_BT, self._counted_BT = read_data(folder)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._ids_BT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence: its ids, its mask and its labels (T)."""
        ids_T, counted_T = self._ids_BT[index], self._counted_BT[index]
        held_T = ids_T != PADDING
        read = {
            "input_ids": np.where(held_T, ids_T, 0),
            "attention_mask": held_T,
            "labels": np.where(counted_T, ids_T, IGNORED),
        }
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in read.items()}


def stacked(sequences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return sequences as a batch, without the places that are padding in all of them."""
    longest = max(int(one["attention_mask"].sum()) for one in sequences)
    return {name: torch.stack([one[name][:longest] for one in sequences]) for name in sequences[0]}
