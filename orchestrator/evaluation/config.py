"""Declares the settings of `evaluate`; those that `prune` has too are declared there."""

from dataclasses import dataclass

from orchestrator.config import AT_LEAST_ONE, TASKS, PruneConfig, require_named_tasks, require_one_place
from orchestrator.settings import Check, Effect, check_settings, require, same_setting, setting
from orchestrator.sources.storage import is_uri

EVALUATE = ("evaluate",)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The settings of `evaluate`: the options of the command line, and those of a `--config` file.

    Raises:
        ConfigError: A setting has another type, is out of range or contradicts another.
    """

    models: tuple[str, ...] = setting(
        (),
        "The models: directories, URIs or hub ids; the first is the one that the others are compared with.",
        None,
        EVALUATE,
        effect=Effect.INPUT,
    )
    output: str | None = same_setting(PruneConfig, "output", shown="evaluations/<first model>")
    overwrite: bool = same_setting(PruneConfig, "overwrite")
    data: tuple[str, ...] = setting(
        (),
        "Text or tokens to measure perplexity on; repeatable.",
        "Data",
        EVALUATE,
        effect=Effect.INPUT,
        metavar="SPEC",
        shown="builtin:heldout, if there are no tasks",
    )
    length: tuple[int, ...] = setting(
        (2048,),
        "Tokens of a window, at most the model's maximum; repeatable.",
        "Data",
        EVALUATE,
        check=Check(lambda value: value >= 2, "a window must have two tokens at least"),
        shown="2048",
    )
    stride: int | None = setting(
        None,
        "Tokens between the starts of two windows; only the last ones of a window count.",
        "Data",
        EVALUATE,
        check=AT_LEAST_ONE,
        shown="the length",
    )
    tokens: int | None = setting(
        None, "How many tokens of each text to take.", "Data", EVALUATE, check=AT_LEAST_ONE, shown="all"
    )
    tasks: tuple[str, ...] = same_setting(PruneConfig, "tasks")
    task_folder: str | None = same_setting(PruneConfig, "task_folder")
    limit: int | None = same_setting(PruneConfig, "limit")
    num_fewshot: int | None = setting(
        None,
        "Examples before each question.",
        TASKS,
        EVALUATE,
        check=Check(lambda value: value >= 0, "it must be at least 0"),
        shown="the task's own number",
    )
    batch_size: int | None = setting(
        None,
        "Questions that a worker answers at once.",
        TASKS,
        EVALUATE,
        check=AT_LEAST_ONE,
        shown="as many as its memory holds",
    )
    workers: int | None = same_setting(PruneConfig, "workers")
    gpus_per_worker: float | None = same_setting(PruneConfig, "gpus_per_worker")
    local: bool = same_setting(PruneConfig, "local")
    shared_storage: bool = same_setting(PruneConfig, "shared_storage")
    address: str | None = same_setting(PruneConfig, "address")
    experiment: str = same_setting(PruneConfig, "experiment")
    tracking_uri: str | None = same_setting(PruneConfig, "tracking_uri")
    run_name: str | None = same_setting(PruneConfig, "run_name", shown="<first model>-evaluation")

    # Workers hold no hidden states between calls.
    offload = False

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the models."""
        check_settings(self)
        require(bool(self.models), "no model is named: pass one or more, the one to compare with first")
        require(len(set(self.models)) == len(self.models), "a model was given twice: give each once")
        require(
            not is_uri(self.output or ""),
            f"output {self.output} is a URI, but an evaluation needs a directory: pass one, and copy it to the URI",
        )
        require_one_place(self.local, self.address)
        self._check_measures()

    def _check_measures(self) -> None:
        shortest = min(self.length, default=0)
        require(bool(self.length), "no length is given: give at least one")
        require(len(set(self.length)) == len(self.length), "a length was given twice: give each once")
        require(
            self.stride is None or self.stride <= shortest,
            f"stride is {self.stride}, so windows of {shortest} tokens leave tokens out: give at most {shortest}",
        )
        require_named_tasks(self, ("task_folder", "limit", "num_fewshot", "batch_size"))
