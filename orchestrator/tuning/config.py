"""Declares the settings of `tune`; those that `prune` has too are declared there."""

from dataclasses import dataclass

from orchestrator.config import AT_LEAST_ONE, PruneConfig, require_one_place
from orchestrator.settings import Check, Effect, check_settings, require, same_setting, setting

TRAINING = "Training"
TUNE = ("tune",)
DISTIL, LORA, FULL, BLOCKS = "distil", "lora", "full", "blocks"
POSITIVE = Check(lambda value: value > 0, "it must be greater than 0")


@dataclass(frozen=True)
class Defaults:
    """What a method trains by if the user does not say: steps, or else passes over the data."""

    learning_rate: float
    batch_size: int
    steps: int | None = None
    epochs: int | None = None


# LoRA on instructions has the recipe of the SlimLLM paper (section 4.1).
DEFAULTS = {
    DISTIL: Defaults(learning_rate=1e-3, batch_size=16, steps=200),
    LORA: Defaults(learning_rate=1e-4, batch_size=64, epochs=2),
    FULL: Defaults(learning_rate=1e-4, batch_size=16, steps=200),
    BLOCKS: Defaults(learning_rate=1e-3, batch_size=1, epochs=4),
}
# Distillation into all parameters changes each of them, so its steps are as small as those of `full`.
DISTIL_ALL = DEFAULTS[FULL]


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The settings of `tune`: the options of the command line, and those of a `--config` file.

    Raises:
        ConfigError: A setting has another type, is out of range or contradicts another.
    """

    checkpoint: str | None = setting(
        None,
        "The pruned checkpoint: a directory, a URI or a hub id.",
        None,
        TUNE,
        effect=Effect.INPUT,
        tags_models=True,
    )
    output: str | None = same_setting(PruneConfig, "output", shown="tuned/<checkpoint>")
    overwrite: bool = same_setting(PruneConfig, "overwrite")
    resume: bool = same_setting(PruneConfig, "resume")
    method: str = setting(
        DISTIL,
        "How to train: distil towards the dense model; lora on instructions; full on text; blocks, layer by layer.",
        TRAINING,
        TUNE,
        choices=tuple(DEFAULTS),
        tags_models=True,
    )
    full: bool = setting(
        False, "Distil into all parameters, not into LoRA's adapters.", TRAINING, TUNE, tags_models=True
    )
    teacher: str | None = setting(
        None,
        "The dense model, to train towards or to measure beside: a directory, a URI or a hub id.",
        TRAINING,
        TUNE,
        effect=Effect.INPUT,
        shown="the model that was pruned",
    )
    steps: int | None = setting(None, "Steps of the optimiser.", TRAINING, TUNE, check=AT_LEAST_ONE, shown="200")
    epochs: int | None = setting(
        None,
        "Passes over the data, instead of steps.",
        TRAINING,
        TUNE,
        check=AT_LEAST_ONE,
        shown="2 for lora, 4 for blocks",
    )
    batch_size: int | None = setting(
        None,
        "Sequences of a step, over all workers.",
        TRAINING,
        TUNE,
        check=AT_LEAST_ONE,
        shown="16, 64 for lora, 1 for blocks",
    )
    micro_batch_size: int = setting(1, "Sequences that a worker passes at once.", TRAINING, TUNE, check=AT_LEAST_ONE)
    learning_rate: float | None = setting(
        None,
        "The highest learning rate.",
        TRAINING,
        TUNE,
        check=POSITIVE,
        shown="1e-3 for distil and blocks, else 1e-4",
    )
    rank: int = setting(8, "Rank of LoRA's adapters.", TRAINING, TUNE, check=AT_LEAST_ONE, tags_models=True)
    alpha: int = setting(16, "Scale of LoRA's adapters, times their rank.", TRAINING, TUNE, check=POSITIVE)
    evaluate_every: int | None = setting(
        None, "Steps between two evaluations.", TRAINING, TUNE, check=AT_LEAST_ONE, shown="a tenth of all"
    )
    patience: int = setting(
        3, "Evaluations without a better result that end the training.", TRAINING, TUNE, check=AT_LEAST_ONE
    )
    keep_worse: bool = setting(False, "Keep the tuned weights even if the held-out loss is not better.", TRAINING, TUNE)
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass, to save memory.", TRAINING, TUNE
    )
    fsdp: bool = setting(
        False, "Shard the parameters over the workers, for a model that one GPU cannot hold.", TRAINING, TUNE
    )
    data: str | None = setting(
        None,
        "Text, tokens or instructions to train on.",
        "Data",
        TUNE,
        effect=Effect.INPUT,
        metavar="SPEC",
        shown="the calibration text of the pruning",
    )
    validation: str | None = setting(
        None,
        "Held-out data that choose the best step.",
        "Data",
        TUNE,
        effect=Effect.INPUT,
        metavar="SPEC",
        shown="a twentieth of the data",
    )
    pack: bool = setting(False, "Put several instructions into one sequence.", "Data", TUNE)
    sequence_length: int = same_setting(PruneConfig, "sequence_length")
    seed: int = same_setting(PruneConfig, "seed", help="Seed of the data's order and of new parameters.")
    evaluate: tuple[str, ...] = same_setting(PruneConfig, "evaluate", shown="")
    evaluate_tokens: int | None = same_setting(PruneConfig, "evaluate_tokens")
    workers: int | None = same_setting(PruneConfig, "workers")
    gpus_per_worker: float | None = same_setting(PruneConfig, "gpus_per_worker")
    local: bool = same_setting(PruneConfig, "local")
    offload: bool = same_setting(PruneConfig, "offload")
    shared_storage: bool = same_setting(PruneConfig, "shared_storage")
    address: str | None = same_setting(PruneConfig, "address")
    experiment: str = same_setting(PruneConfig, "experiment")
    tracking_uri: str | None = same_setting(PruneConfig, "tracking_uri")
    run_name: str | None = same_setting(PruneConfig, "run_name", shown="<checkpoint>-<method>")
    register: str | None = same_setting(PruneConfig, "register")

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the checkpoint."""
        check_settings(self)
        require(self.checkpoint is not None, "no checkpoint is named: pass CHECKPOINT, a directory that prune wrote")
        require(not (self.steps and self.epochs), "steps and epochs were both given: give one of them")
        self._check_method()
        require_one_place(self.local, self.address)

    def _check_method(self) -> None:
        method = self.method
        require(method == DISTIL or not self.full, f"full belongs to --method distil, not {method}: leave it out")
        require(
            self.has_teacher or self.teacher is None or bool(self.evaluate),
            f"{method} has no teacher, only a dense model to measure beside: pass --evaluate SPEC too, or leave it out",
        )
        require(
            method == LORA or not self.pack,
            f"pack belongs to --method lora: {method} trains on blocks of text, which are packed already",
        )
        require(
            method != BLOCKS or self.steps is None,
            "steps was given, but blocks trains each module by passes over the data: pass epochs",
        )
        require(
            method != BLOCKS or not self.fsdp,
            "fsdp shards a whole model, and blocks holds one layer at a time: leave it out",
        )
        require(
            method != BLOCKS or self.batch_size in (None, 1),
            "batch_size was given, but blocks takes a step for each sequence: leave it out",
        )

    @property
    def _defaults(self) -> Defaults:
        return DISTIL_ALL if self.full else DEFAULTS[self.method]

    @property
    def on_responses(self) -> bool:
        """Whether only the responses of instructions count in the loss."""
        return self.method == LORA

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model takes part in the training."""
        return self.method in (DISTIL, BLOCKS)

    @property
    def with_adapters(self) -> bool:
        """Whether LoRA's adapters are trained, and not the weights themselves."""
        return self.method == LORA or (self.method == DISTIL and not self.full)

    @property
    def sequences_per_step(self) -> int:
        """The sequences of a step."""
        return self.batch_size or self._defaults.batch_size

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or self._defaults.learning_rate

    @property
    def passes(self) -> int | None:
        """The passes over the data; None if the number of steps is given."""
        return None if self.steps else self.epochs or self._defaults.epochs

    def steps_for(self, num_sequences: int) -> int:
        """Return the steps of the optimiser with that many sequences to train on."""
        if self.passes is None:
            return self.steps or self._defaults.steps or 0
        return max(1, self.passes * num_sequences // self.sequences_per_step)
