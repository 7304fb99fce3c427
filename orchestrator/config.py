"""Declares every setting once (docs/settings.md): the settings of `prune`, and those that `compare` adds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.methods import GRAM, ONE_PASS, PAPER, known_methods
from orchestrator.settings import Check, Effect, check_settings, declared, read_settings, require, setting
from orchestrator.settings import ConfigError as ConfigError
from orchestrator.sources.storage import is_uri

DEFAULT_SPARSITY = 0.2
# Begins the data spec of sequences that the model samples itself.
SELF = "self:"
FRACTION = Check(lambda value: 0 < value < 1, "it must lie between 0 and 1, both excluded")
AT_LEAST_ONE = Check(lambda value: value >= 1, "it must be at least 1")

REMOVE = "What to remove"
TASKS = "Tasks"
# Stands for the seven tasks of the SlimLLM paper.
PAPER_NAME = "paper"
# Groups of commands that take a setting.
COMPUTE = ("prune", "calibrate", "compare")
BOTH = ("prune", "compare")
EVERY = (*COMPUTE, "doctor")
MEASURE = ("prune", "compare", "doctor")
RESUMED = ("prune", "calibrate", "doctor")
RECORD = ("prune", "compare", "log")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of `prune`: the options of the command line, and those of a `--config` file.

    A setting takes what Python users have: paths for text, NumPy's numbers, any list for a tuple.

    Raises:
        ConfigError: A setting has another type, is out of range or contradicts another.
    """

    model: str | None = setting(
        None,
        "The model: a directory, a URI or a hub id; without it, the built-in one.",
        None,
        EVERY,
        effect=Effect.INPUT,
        tags_models=True,
    )
    output: str | None = setting(
        None,
        "Where the result goes: a directory or a URI.",
        "Result",
        EVERY,
        effect=Effect.PLACE,
        metavar="DIR",
        shown="pruned/, moments/ or comparisons/<model>",
    )
    overwrite: bool = setting(False, "Replace an output that is not empty.", "Result", EVERY, effect=Effect.ATTEMPT)
    resume: bool = setting(
        False, "Continue an unfinished run of this output.", "Result", RESUMED, effect=Effect.ATTEMPT
    )
    method: str = setting(
        "slimllm",
        f"How to choose units: slimllm layer by layer, or a one-pass method: {', '.join(ONE_PASS.names)}.",
        REMOVE,
        ("prune", "doctor"),
        tags_models=True,
    )
    sparsity: tuple[float, ...] = setting(
        (),
        "Fraction of the decoder layers' parameters to remove; repeatable.",
        REMOVE,
        ("prune", "compare", "doctor"),
        check=FRACTION,
        shown=f"{DEFAULT_SPARSITY:g}".removeprefix("0"),
    )
    refine: bool = setting(
        False,
        "Make a second pass that corrects the model towards the dense one.",
        REMOVE,
        ("prune", "doctor"),
        methods=ONE_PASS,
        tags_models=True,
    )
    moments: str | None = setting(
        None,
        "Moments that `slimllm calibrate` saved, a directory or a URI; they replace the pass over the text.",
        REMOVE,
        ("prune", "doctor"),
        methods=ONE_PASS,
        effect=Effect.INPUT,
        metavar="DIR",
    )
    ratio: float | None = setting(
        None,
        "The paper's pruning ratio, instead of a sparsity.",
        REMOVE,
        BOTH,
        methods=PAPER,
        check=FRACTION,
        tags_models=True,
    )
    pruned_layers: int | None = setting(
        None,
        "How many layers to prune, as in the paper.",
        REMOVE,
        BOTH,
        methods=PAPER,
        check=AT_LEAST_ONE,
        shown="as published",
    )
    alpha: float | None = setting(
        None,
        "How strongly ratios follow the similarity of a layer's input and output.",
        REMOVE,
        BOTH,
        methods=PAPER,
        check=Check(math.isfinite, "it must be a number, such as 10"),
        shown="as published",
    )
    keep_lowest: float = setting(
        0.01,
        "Share of the lowest-scored channels that slimllm keeps, as the published code does.",
        REMOVE,
        BOTH,
        check=Check(lambda value: 0 <= value < 1, "it must lie in [0, 1)"),
    )
    keep_layers: tuple[int, ...] = setting(
        (),
        "Layers that stay whole, such as 0,1,-1; negative numbers count from the end.",
        REMOVE,
        BOTH,
        metavar="N,N",
        by_commas=True,
        tags_models=True,
    )
    max_layer_sparsity: float | None = setting(
        None,
        "The greatest fraction of its heads, and of its channels, that any layer may lose.",
        REMOVE,
        BOTH,
        check=FRACTION,
        shown="no limit",
    )
    uniform: bool = setting(
        False, "Keep the same number of heads and channels in every layer.", "Form", ("prune",), tags_models=True
    )
    uniform_heads: bool = setting(
        False, "Keep the same number of heads in every layer.", "Form", BOTH, tags_models=True
    )
    multiple_of: int = setting(1, "Keep a multiple of N channels in every layer.", "Form", BOTH, check=AT_LEAST_ONE)
    heads_multiple_of: int = setting(
        1,
        "Keep a multiple of N key/value heads, and so of heads, in every layer.",
        "Form",
        BOTH,
        check=AT_LEAST_ONE,
    )
    for_tp: int = setting(
        1,
        "Keep what divides by N in every layer, for tensor parallelism over N GPUs: heads, key/value heads, channels.",
        "Form",
        BOTH,
        check=AT_LEAST_ONE,
    )
    no_bias: bool = setting(False, "Recover without new biases.", "Form", ("prune",), tags_models=True)
    drop_layers: bool = setting(
        False, "Remove whole layers where that costs less than heads and channels.", REMOVE, RESUMED, methods=GRAM
    )
    revision: str | None = setting(
        None, "A hub model's branch, tag or commit.", "Data", EVERY, effect=Effect.INPUT, tags_models=True
    )
    calibration: str | None = setting(
        None,
        "Text or tokens to calibrate on; self:N has the model sample N sequences instead.",
        "Data",
        EVERY,
        effect=Effect.INPUT,
        metavar="SPEC",
        shown="builtin:calibration",
    )
    generate: int = setting(
        0,
        "Sequences to add to the calibration text, which the model samples itself.",
        "Data",
        EVERY,
        check=Check(lambda value: value >= 0, "it must be at least 0"),
        tags_models=True,
    )
    samples: int = setting(128, "Blocks to draw from a text to calibrate on.", "Data", EVERY, check=AT_LEAST_ONE)
    sequence_length: int = setting(
        2048,
        "Tokens per block, at most the model's maximum.",
        "Data",
        EVERY,
        check=Check(lambda value: value >= 2, "a block must have two tokens at least"),
    )
    seed: int = setting(
        0,
        "Seed that chooses the blocks of a text.",
        "Data",
        COMPUTE,
        check=Check(lambda value: 0 <= value < 2**63, "it must be at least 0, and less than 2^63"),
    )
    evaluate: tuple[str, ...] = setting(
        (),
        "Held-out text or tokens for perplexity before and after; repeatable.",
        "Data",
        MEASURE,
        effect=Effect.INPUT,
        metavar="SPEC",
        shown="builtin:heldout, if neither text nor moments are given",
    )
    evaluate_tokens: int | None = setting(
        None, "How many tokens of each held-out text to take.", "Data", MEASURE, check=AT_LEAST_ONE, shown="all"
    )
    tasks: tuple[str, ...] = setting(
        (),
        f"Tasks of lm-eval; {PAPER_NAME!r} stands for the seven of the SlimLLM paper.",
        TASKS,
        BOTH,
        metavar="NAME,NAME",
        by_commas=True,
    )
    task_folder: str | None = setting(
        None, "A folder with more tasks, as YAML files.", TASKS, BOTH, effect=Effect.INPUT, metavar="DIR"
    )
    limit: int | None = setting(
        None, "How many questions of each task to ask.", TASKS, BOTH, check=AT_LEAST_ONE, shown="all"
    )
    workers: int | None = setting(
        None, "How many Ray actors to use.", "Workers", EVERY, check=AT_LEAST_ONE, shown="one per GPU or per 4 cores"
    )
    gpus_per_worker: float | None = setting(
        None,
        "Share of a GPU for each worker.",
        "Workers",
        EVERY,
        check=Check(lambda value: 0 <= value <= 1, "a worker computes on one GPU at most, so pass 0 to 1"),
        shown="1, if there are GPUs",
    )
    local: bool = setting(False, "Compute in this process, without Ray.", "Workers", COMPUTE, effect=Effect.ATTEMPT)
    offload: bool = setting(
        False, "Keep hidden states in files in TMPDIR, not in memory.", "Workers", EVERY, effect=Effect.PLACE
    )
    shared_storage: bool = setting(
        False,
        "All nodes see the driver's files at the same paths; each reads the weights itself.",
        "Workers",
        EVERY,
        effect=Effect.PLACE,
    )
    address: str | None = setting(
        None,
        "Head of a Ray cluster, host:port.",
        "Workers",
        EVERY,
        effect=Effect.ATTEMPT,
        metavar="ADDR",
        shown="a local Ray",
    )
    experiment: str = setting("slimllm", "MLflow experiment.", "MLflow", RECORD, effect=Effect.PLACE)
    tracking_uri: str | None = setting(
        None,
        'MLflow store, or "none".',
        "MLflow",
        (*RECORD, "doctor"),
        effect=Effect.ATTEMPT,
        metavar="URI",
        shown="sqlite:///mlflow.db",
    )
    run_name: str | None = setting(
        None, "Name of the MLflow run.", "MLflow", RECORD, effect=Effect.PLACE, shown="<model>-<method>-<sparsity>"
    )
    register: str | None = setting(
        None, "Register each checkpoint as a version of this model.", "MLflow", ("prune", "log"), effect=Effect.PLACE
    )

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the model."""
        check_settings(self)
        known = known_methods(self.method)
        require(self.method in known, f"method {self.method!r} is unknown: choose one of {', '.join(known)}")
        self._check_targets()
        self._check_layers()
        self._check_generate()
        require(
            self.revision is None or self.model is not None,
            f"revision {self.revision!r} is of a hub model, and none is named: pass MODEL, or leave the revision out",
        )
        require_named_tasks(self, ("task_folder", "limit"))
        require_one_place(self.local, self.address)
        self._check_command()

    def _check_targets(self) -> None:
        require(
            not self.sparsity or self.ratio is None,
            "sparsity and ratio were both given: sparsity solves for the ratio, so give one of them",
        )
        require(len(set(self.sparsity)) == len(self.sparsity), "a sparsity was given twice: give each once")

    def _check_layers(self) -> None:
        for name in ("uniform", "uniform_heads"):
            require(
                not (self.keep_layers and getattr(self, name)),
                f"keep_layers keeps every head of some layers, and {name} as many in all: give one of them",
            )
        limit = self.max_layer_sparsity
        require(
            limit is None or not self.drop_layers,
            "max_layer_sparsity limits what a layer loses, and drop_layers takes whole layers: give one of them",
        )
        require(
            limit is None or self.ratio is None or self.ratio <= limit,
            f"ratio {self.ratio} is the mean of what pruned layers lose, and max_layer_sparsity {limit} the most: "
            f"lower ratio, or raise max_layer_sparsity",
        )

    def _check_generate(self) -> None:
        require(
            not (self.generate and (self.calibration or "").startswith(SELF)),
            f"calibration {self.calibration} is sampled by the model already: raise its number, or leave generate out",
        )
        require(
            not (self.generate and self.moments),
            "moments stand for the calibration data, and generate adds to these: pass generate to calibrate instead",
        )

    def _check_command(self) -> None:
        for name in ("pruned_layers", "alpha"):
            require(
                not self.uniform or getattr(self, name) is None,
                f"{name} makes layers differ, and uniform makes them equal: give one of them",
            )
        for one in declared(PruneConfig).values():
            if one.is_set(self):
                one.require_method(self.method)

    @property
    def in_one_pass(self) -> bool:
        """Whether one pass over the dense model serves every sparsity, instead of a pass for each."""
        return self.method in ONE_PASS

    @property
    def targets(self) -> tuple[float | None, ...]:
        """The sparsities to reach: .2 by default, None if the paper's ratio is given instead."""
        return (None,) if self.ratio is not None else self.sparsity or (DEFAULT_SPARSITY,)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(PruneConfig):
    """The settings of `compare`: those of `prune` that it takes, the methods to compare, and whether to keep models.

    `ratio`, `pruned_layers`, `alpha` and `keep_lowest` apply to `slimllm`, which always takes part.
    """

    methods: tuple[str, ...] = setting(
        (), "Method to compare with slimllm; repeatable.", REMOVE, ("compare",), flag="--method", shown="all"
    )
    keep_checkpoints: bool = setting(False, "Keep every pruned model.", "Result", ("compare",))

    def _check_command(self) -> None:
        require(
            not is_uri(self.output or ""),
            f"output {self.output} is a URI, but a comparison needs a directory: pass one, and copy it to the URI",
        )
        require(len(set(self.methods)) == len(self.methods), "a method was given twice: give each once")
        require(self.method == "slimllm", "method is a setting of prune: a comparison takes methods")
        for name, one in declared(PruneConfig).items():
            require(
                "compare" in one.commands or not one.is_set(self),
                f"{name} is a setting of prune: leave it out of a comparison",
            )


def require_named_tasks(config: Any, names: Sequence[str]) -> None:
    """Check that a config has tasks if it has settings for them, by these names, and that their folder is there.

    Raises:
        ConfigError: A setting is for tasks, and there are none; the folder is missing.
    """
    folder = config.task_folder
    require(
        folder is None or Path(folder).is_dir(),
        f"task_folder {folder} is not a folder: pass one that holds tasks as YAML files",
    )
    for name in names:
        require(
            bool(config.tasks) or getattr(config, name) is None, f"{name} is for tasks, and none is named: pass tasks"
        )


def require_one_place(local: bool, address: str | None) -> None:
    """Check that a run computes in this process or on a cluster, and not on both.

    Raises:
        ConfigError: Both are asked for.
    """
    require(
        not (local and address), "local computes in this process, and address names a Ray cluster: give one of them"
    )


def read_config_file(path: Path, kind: type = PruneConfig) -> dict[str, Any]:
    """Read settings from a TOML file, by the names of the config's fields; dashes count as underscores.

    Raises:
        ConfigError: The file cannot be read, or holds an unknown key, a wrong value, or what is an option only.
    """
    return read_settings(path, declared(kind))
