"""Statistics of paired differences: two models answer the same questions, or predict the same tokens."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far a model's values are from those of the first model, on the same questions.

    Attributes:
        mean: The mean of the differences.
        stderr: Its standard error.
        p_value: The probability of a mean at least as far from 0 if the models were equally good: a paired z-test.
    """

    mean: float
    stderr: float
    p_value: float


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of independent values; NaN for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_difference(values: np.ndarray, first: np.ndarray) -> Difference:
    """Return how far values are from the first model's, question by question."""
    differences = values - first
    mean, stderr = float(differences.mean()), standard_error(differences)
    # Where all differences are equal, the mean is certain.
    p_value = math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(mean, stderr, p_value)
