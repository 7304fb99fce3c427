"""Holds what an evaluation found of each model, on texts and on tasks."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.evaluation.statistics import Difference, paired_difference
from orchestrator.pruning.perplexity import LARGEST_LOSS
from orchestrator.secrets import masked


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions are from the first model's.

    Attributes:
        mean: The mean over tokens of KL(first model || model), in nats.
        percentiles: That divergence by percentile over tokens, in nats.
        agreement: The share of tokens for which both models have the same most likely next token.
        loss: The difference of the losses, in nats per token, window by window.
    """

    mean: float
    percentiles: dict[int, float]
    agreement: float
    loss: Difference


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """A model's figures on a text.

    Attributes:
        data: The text.
        digest: The digest of its tokens.
        length: The tokens of a window.
        stride: Tokens between the starts of two windows.
        tokens: The next tokens that count.
        loss: Mean negative log-likelihood, in nats per token.
        loss_stderr: Its standard error, from the windows' means.
        bits_per_byte: The loss in bits per byte of text; None without a tokenizer.
        distance: The distance from the first model; None for that model, and where vocabularies differ.
    """

    data: str
    digest: str
    length: int
    stride: int
    tokens: int
    loss: float
    loss_stderr: float
    bits_per_byte: float | None
    distance: Distance | None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < LARGEST_LOSS else math.inf


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """A model's figure on a task, by one metric.

    Attributes:
        task: The task, or group of tasks.
        metric: The metric, such as "acc"; with the name of its filter, unless that is "none".
        value: The figure.
        stderr: Its standard error, as lm-eval gives it; None if it gives none.
        questions: How many questions were asked; None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int | None

    @property
    def name(self) -> str:
        """The task and the metric."""
        return f"{self.task}, {self.metric}"

    @property
    def metric_name(self) -> str:
        """The name of the figure in MLflow."""
        return f"{metric_name(self.task)}/{metric_name(self.metric)}"


@dataclass(frozen=True, kw_only=True)
class TaskResult(TaskFigure):
    """A model's figure on a task, beside the first model's.

    Attributes:
        difference: How far it is from the first model's, question by question; None for that model, and for metrics
            that are no mean over questions.
    """

    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class TaskAnswers(TaskFigure):
    """A model's figure on a task, and its value for each question.

    Attributes:
        values: The metric of each question, in order; None for metrics that are no mean over questions.
    """

    values: list[float] | None

    def beside(self, first: "TaskAnswers | None") -> TaskResult:
        """Return the result, with the difference to the first model's answers if both can be paired."""
        values, others = self.values or [], (first and first.values) or []
        paired = bool(values) and len(values) == len(others)
        return TaskResult(
            task=self.task,
            metric=self.metric,
            value=self.value,
            stderr=self.stderr,
            questions=self.questions,
            difference=paired_difference(np.array(values), np.array(others)) if paired else None,
        )


def compare_answers(answers: Sequence[TaskAnswers], first: Sequence[TaskAnswers] | None) -> tuple[TaskResult, ...]:
    """Return a model's results beside the first model's; without one, alone."""
    others = {(one.task, one.metric): one for one in first or ()}
    return tuple(one.beside(others.get((one.task, one.metric))) for one in answers)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """A model's figures.

    Attributes:
        name: The model's name.
        digest: The digest of its weights.
        parameters: Its parameters.
        texts: The figures on each text, by length.
        tasks: The figures on each task.
    """

    name: str
    digest: str
    parameters: int
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]

    def metrics(self) -> dict[str, float]:
        """Return the figures as metrics, whose names say the text or the task."""
        found: dict[str, float] = {}
        for one in self.texts:
            where = f"{metric_name(one.data)}/{one.length}"
            found |= {f"perplexity/{where}": one.perplexity, f"loss/{where}": one.loss}
            if one.bits_per_byte is not None:
                found[f"bits_per_byte/{where}"] = one.bits_per_byte
            if one.distance is not None:
                found |= {f"kl/{where}": one.distance.mean, f"agreement/{where}": one.distance.agreement}
        return found | {one.metric_name: one.value for one in self.tasks}


def metric_name(text: str) -> str:
    """Return the end of a path, or a name, with the characters that MLflow takes in the name of a metric."""
    return re.sub(r"[^\w.\- ]", "-", Path(masked(text)).name)
