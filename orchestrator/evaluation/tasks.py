"""Asks models the questions of lm-eval's tasks: an `LM` whose requests are answered on the workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from actors.group import ShardGroup
from orchestrator.data import DataError
from orchestrator.data.files import error_line
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.inputs import Evaluated, EvaluationInputs
from orchestrator.evaluation.results import TaskResult
from orchestrator.evaluation.statistics import Difference, paired_difference
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from slimllm_ops.evaluation.answering import AnsweringStream

# Requests that each worker gets at once.
PIECE = 256
# What the names of lm-eval's standard errors end with.
STDERR = "_stderr"


class ShardedLM(LM):
    """A model for lm-eval whose requests are answered on shards, and returned in their order.

    Args:
        shards: The shards.
        stream: The name of the stream that answers.
        num_shards: How many shards there are.
        name: The model's name.
        reporter: Shows the progress.
    """

    def __init__(self, shards: ShardGroup, stream: str, num_shards: int, name: str, reporter: Reporter) -> None:
        super().__init__()
        self._shards, self._stream, self._num_shards = shards, stream, num_shards
        self._name, self._reporter = name, reporter

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval keeps requests apart in its cache."""
        return self._name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each request's continuation, and whether greedy decoding gives it."""
        return self._answer(HFLM.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each request's text."""
        return self._answer(HFLM.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text that the model generates for each request."""
        return self._answer(HFLM.generate_until, requests)

    def _answer(self, ask: Callable[..., list[Any]], requests: list[Instance]) -> list[Any]:
        pieces = [requests[start : start + PIECE] for start in range(0, len(requests), PIECE)]
        rounds = -(-len(pieces) // self._num_shards)
        answers: list[Any] = []
        for number in self._reporter.steps(self._stream, "batch", rounds, PIECE * self._num_shards, of="requests"):
            given = pieces[number * self._num_shards : (number + 1) * self._num_shards]
            asked = [(ask, piece) for piece in (*given, *[[]] * (self._num_shards - len(given)))]
            for part in self._shards.each_its_own(self._stream, AnsweringStream.answer, asked):
                answers += part
        return answers


def require_tasks(config: EvaluateConfig) -> TaskManager:
    """Return lm-eval's tasks, after checking that the named ones are known and their data can be loaded.

    Raises:
        DataError: A task is unknown, or its data cannot be loaded.
    """
    manager = _known_tasks(config)
    for name in config.task_names:
        if name not in manager.all_tasks:
            raise DataError(
                f"task {name!r} is unknown to lm-eval: `lm-eval ls tasks` lists its tasks; pass those of your own as "
                f"--task-folder DIR"
            )
        try:
            manager.load([name])
        # Any exception: datasets and lm-eval raise a dozen types.
        except Exception as error:
            raise DataError(
                f"the data of task {name} cannot be loaded ({error_line(error)}): check the network, or the files that "
                f"the task names"
            ) from error
    return manager


def _known_tasks(config: EvaluateConfig) -> TaskManager:
    """Return the tasks of the config's folder if they are all that is asked for, or else lm-eval's own too."""
    if config.task_folder is not None:
        own = TaskManager(include_path=config.task_folder, include_defaults=False)
        # Reading lm-eval's thousands of tasks takes seconds.
        if set(config.task_names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=config.task_folder)


def ask_tasks(
    shards: ShardGroup, inputs: EvaluationInputs, reporter: Reporter, config: EvaluateConfig, manager: TaskManager
) -> dict[str, tuple[TaskResult, ...]]:
    """Ask every model the questions of the config's tasks; return the results by the models' names."""
    found: dict[str, tuple[TaskResult, ...]] = {}
    first: Mapping[str, Any] | None = None
    for model in inputs.models:
        answered = _ask(shards, model, config, manager, reporter)
        found[model.name] = tuple(_results(answered, first))
        first = first or answered
    return found


def _ask(
    shards: ShardGroup, model: Evaluated, config: EvaluateConfig, manager: TaskManager, reporter: Reporter
) -> Mapping[str, Any]:
    """Return what lm-eval finds of a model."""
    stage = f"{model.name}, tasks"
    for attempt in attempts(shards, reporter):
        with attempt:
            num_shards = shards.open_answering(stage, model.whole, config.batch_size)
            found = simple_evaluate(
                model=ShardedLM(shards, stage, num_shards, model.name, reporter),
                tasks=list(config.task_names),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                task_manager=manager,
            )
            shards.close_stream(stage)
    assert found is not None, "this process has rank 0"
    return found


def _results(answered: Mapping[str, Any], first: Mapping[str, Any] | None) -> list[TaskResult]:
    results = []
    for task, figures in answered["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith(STDERR) or isinstance(value, str):
                continue
            stderr = figures.get(f"{metric}{STDERR},{kind}")
            values = _values(answered, task, metric, kind)
            others = None if first is None else _values(first, task, metric, kind)
            results.append(
                TaskResult(
                    task=task,
                    metric=metric if kind == "none" else f"{metric}, {kind}",
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,
                    questions=answered["n-samples"].get(task, {}).get("effective"),
                    difference=_difference(values, others),
                )
            )
    return results


def _values(answered: Mapping[str, Any], task: str, metric: str, kind: str) -> np.ndarray | None:
    """Return a metric's value for each question of a task, in order; None if it is no number per question."""
    samples: Sequence[Mapping[str, Any]] = answered["samples"].get(task, ())
    asked = sorted((one for one in samples if one["filter"] == kind), key=lambda one: one["doc_id"])
    values = [one.get(metric) for one in asked]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _difference(values: np.ndarray | None, first: np.ndarray | None) -> Difference | None:
    if values is None or first is None or len(values) != len(first):
        return None
    return paired_difference(values, first)
