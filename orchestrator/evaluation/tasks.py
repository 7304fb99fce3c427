"""Asks models the questions of lm-eval's tasks: an `LM` whose requests are answered on the workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from actors.group import ShardGroup
from orchestrator.data import DataError
from orchestrator.data.files import error_line
from orchestrator.evaluation.asking import TaskOptions
from orchestrator.evaluation.results import TaskAnswers
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from slimllm_ops.checkpoint.whole import WholeModel
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


def require_tasks(options: TaskOptions) -> TaskManager:
    """Return lm-eval's tasks, after checking that the named ones are known and their data can be loaded.

    Raises:
        DataError: A task is unknown, or its data cannot be loaded.
    """
    manager = _known_tasks(options)
    for name in options.names:
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


def _known_tasks(options: TaskOptions) -> TaskManager:
    """Return the tasks of the folder if they are all that is asked for, or else lm-eval's own too."""
    if options.folder is not None:
        own = TaskManager(include_path=options.folder, include_defaults=False)
        # Reading lm-eval's thousands of tasks takes seconds.
        if set(options.names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=options.folder)


def ask_tasks(
    shards: ShardGroup, model: WholeModel, name: str, reporter: Reporter, options: TaskOptions, manager: TaskManager
) -> list[TaskAnswers]:
    """Ask a model the questions of some tasks.

    Args:
        shards: The shards to ask on.
        model: The model.
        name: Its name in progress lines.
        reporter: Shows the progress.
        options: The tasks.
        manager: What `require_tasks` returned for them.

    Raises:
        ConfigError: A worker has no room for the whole model.
    """
    stage = f"{name}, tasks"
    for attempt in attempts(shards, reporter):
        with attempt:
            num_shards = shards.open_answering(stage, model, options.batch_size)
            found = simple_evaluate(
                model=ShardedLM(shards, stage, num_shards, name, reporter),
                tasks=list(options.names),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                task_manager=manager,
            )
            shards.close_stream(stage)
    assert found is not None, "this process has rank 0"
    return _answers(found)


def _answers(found: Mapping[str, Any]) -> list[TaskAnswers]:
    answers = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith(STDERR) or isinstance(value, str):
                continue
            stderr = figures.get(f"{metric}{STDERR},{kind}")
            answers.append(
                TaskAnswers(
                    task=task,
                    metric=metric if kind == "none" else f"{metric}, {kind}",
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,
                    questions=found["n-samples"].get(task, {}).get("effective"),
                    values=_values(found, task, metric, kind),
                )
            )
    return answers


def _values(found: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float] | None:
    """Return a metric's value for each question of a task, in order; None if it is no number per question."""
    samples: Sequence[Mapping[str, Any]] = found["samples"].get(task, ())
    asked = sorted((one for one in samples if one["filter"] == kind), key=lambda one: one["doc_id"])
    values = [one.get(metric) for one in asked]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if numbers and len(numbers) == len(values) else None
