"""Says which tasks to ask, and returns what asks them: lm-eval, which is imported only if there are tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from actors.group import ShardGroup
from cluster import WorkerPlan
from orchestrator.config import PAPER_NAME, ConfigError, PruneConfig
from orchestrator.evaluation.results import TaskAnswers
from orchestrator.progress import Reporter
from slimllm_ops.checkpoint.whole import WholeModel

# The seven zero-shot tasks of the SlimLLM paper (section 4.1), by the names that lm-eval has for them.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# Asks a model of this name the questions of some tasks.
Ask = Callable[[ShardGroup, WholeModel, str, Reporter], list[TaskAnswers]]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The tasks to ask, and how.

    Attributes:
        names: The names that lm-eval has for the tasks.
        folder: A folder with more tasks, as YAML files.
        limit: How many questions of each task to ask; None for all.
        num_fewshot: Examples before each question; None for the task's own number.
        batch_size: Questions that a worker answers at once; None for as many as its memory holds.
    """

    names: tuple[str, ...]
    folder: str | None
    limit: int | None
    num_fewshot: int | None = None
    batch_size: int | None = None


def task_names(named: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks, with the seven of the paper in place of their common name; each once."""
    return tuple(dict.fromkeys(one for name in named for one in (PAPER_TASKS if name == PAPER_NAME else (name,))))


def tasks_of_run(config: PruneConfig) -> TaskOptions:
    """Return the tasks that a pruning or a comparison asks."""
    return TaskOptions(names=task_names(config.tasks), folder=config.task_folder, limit=config.limit)


def prepare_tasks(options: TaskOptions) -> Ask | None:
    """Return what asks the tasks, after checking that they can be asked; None without any.

    Raises:
        ConfigError: lm-eval is not installed.
        DataError: A task is unknown, or its data cannot be loaded.
    """
    if not options.names:
        return None
    try:
        from orchestrator.evaluation.tasks import ask_tasks, require_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need lm-eval, which is not installed ({error}): run pip install -e '.[eval]' in slimllm's checkout"
        ) from error
    return partial(ask_tasks, options=options, manager=require_tasks(options))


def require_shared_files(workers: WorkerPlan) -> None:
    """Check that every worker can read the models' files.

    Raises:
        ConfigError: Some node does not see the driver's files.
    """
    if workers.weights_travel:
        raise ConfigError(
            "the workers of an evaluation read whole models at the same paths on every node: put the models on storage "
            "that all nodes see, and pass --shared-storage"
        )
