"""The calibration data of a run: blocks of text, of stored moments, or to be sampled by the model itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import PruneConfig
from orchestrator.data import TextOptions, TokenBlocks, freeze, load_tokens
from orchestrator.data.prompts import begin_prompts, draw_prompts, sequences_asked
from orchestrator.secrets import MASK
from orchestrator.sources import storage
from slimllm_ops.checkpoint.moment_store import MomentStore
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import InputError

BUILTIN_CALIBRATION = "builtin:calibration"
# In a directory of moments: the sequences that the model sampled.
GENERATED = "generated.arrow"


@dataclass(frozen=True)
class Calibration:
    """A run's calibration data; it includes the blocks only if they pass through the model in this run.

    `padding` counts the places of the blocks that hold no token; `pinned` is that of the blocks; `generated` counts the
    sequences that the model samples, which are the last blocks.
    """

    spec: str
    digest: str
    num_blocks: int
    block_length: int
    padding: int = 0
    pinned: str | None = None
    generated: int = 0
    blocks: TokenBlocks | None = None

    @classmethod
    def of(cls, blocks: TokenBlocks, generated: int = 0) -> "Calibration":
        """Describe blocks, and include them."""
        num_blocks, block_length = blocks.input_ids_BT.shape
        padding = num_blocks * block_length - blocks.num_tokens
        return cls(blocks.spec, blocks.digest, num_blocks, block_length, padding, blocks.pinned, generated, blocks)

    @property
    def num_tokens(self) -> int:
        """The total number of tokens, without padding."""
        return self.num_blocks * self.block_length - self.padding

    @property
    def generated_BT(self) -> np.ndarray:
        """The sequences that the model sampled, int32."""
        assert self.blocks is not None, "this run uses stored moments instead of blocks"
        return self.blocks.input_ids_BT[self.num_blocks - self.generated :]

    def describe(self) -> dict[str, Any]:
        """Return everything except the blocks, as a manifest stores it."""
        names = ("spec", "digest", "num_blocks", "block_length", "padding", "pinned", "generated")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sampling:
    """Sequences that the dense model should sample before anything is calibrated.

    Attributes:
        prompts_NP: What each sequence begins with, int32.
        length: The tokens of a sequence, prompt included.
        text: The blocks that the sequences are added to; None if there are no others.
        spec: The calibration data, as the user named it.
    """

    prompts_NP: np.ndarray
    length: int
    text: TokenBlocks | None
    spec: str

    def expected(self) -> Calibration:
        """Return the calibration data without its blocks; the digest is that of the text, or of the prompts."""
        text = Calibration.of(self.text or freeze(self.spec, self.prompts_NP, len(self.prompts_NP), None))
        others = 0 if self.text is None else text.num_blocks
        number = len(self.prompts_NP)
        return Calibration(
            self.spec, text.digest, others + number, self.length, text.padding, text.pinned, generated=number
        )

    def completed(self, sequences_NT: np.ndarray) -> Calibration:
        """Return the calibration data with the sequences, int32."""
        return _joined(self.spec, self.text, sequences_NT)


def _joined(spec: str, text: TokenBlocks | None, sequences_NT: np.ndarray) -> Calibration:
    """Return the calibration data of a text's blocks, if there are any, and of sampled sequences."""
    ids_BT = sequences_NT if text is None else np.concatenate([text.input_ids_BT, sequences_NT])
    pinned = None if text is None else text.pinned
    return Calibration.of(freeze(spec, ids_BT, len(ids_BT), None, pinned), generated=len(sequences_NT))


def load_calibration(config: PruneConfig, source: Checkpoint) -> tuple[Calibration, Sampling | None]:
    """Load the calibration blocks, and say what the model should add to them.

    Raises:
        DataError, InputError: The data spec does not give token blocks, or no token begins the model's texts.
    """
    spec = config.calibration or BUILTIN_CALIBRATION
    if number := sequences_asked(spec):
        length = min(config.sequence_length, source.config.max_position_embeddings)
        sampling = Sampling(begin_prompts(source.config, number), length, None, spec)
    else:
        text = _load_text(config, source, spec)
        if not config.generate:
            return Calibration.of(text), None
        prompts_NP = draw_prompts(text.input_ids_BT, config.generate, config.seed)
        sampling = Sampling(prompts_NP, text.input_ids_BT.shape[1], text, text.spec)
    return sampling.expected(), sampling


def stored_calibration(config: PruneConfig, source: Checkpoint, digest: str, moments: Path) -> Calibration:
    """Return the calibration data of stored moments, with its blocks if the refinement passes them.

    Raises:
        DataError, InputError: The moments are of another model, or of other data than the config names.
    """
    with storage.naming_uri(config.moments, moments, InputError):
        manifest = MomentStore(moments).manifest()
    if manifest["model_digest"] != digest:
        raise InputError(
            f"the moments in {config.moments} are of {manifest['model']} with weights {manifest['model_digest'][:12]}, "
            f"{source.directory} has {digest[:12]}: run `slimllm calibrate` on this model"
        )
    if config.drop_layers and not manifest.get("drop_layers"):
        raise InputError(
            f"the moments in {config.moments} do not say what each layer changes, which --drop-layers needs: "
            f"run `slimllm calibrate --drop-layers`"
        )
    try:
        kept = Calibration(**manifest["calibration"])
    except TypeError as error:
        raise InputError(
            f"the moments in {config.moments} do not name their calibration data ({error}): run `slimllm calibrate`"
        ) from error
    if not config.refine:
        return kept
    if config.calibration is None and storage.is_uri(kept.spec) and MASK in kept.spec:
        raise InputError(
            f"the refinement reads {kept.spec}, from which the moments in {config.moments} are, and they keep no "
            f"password: pass --calibration with the whole address"
        )
    blocks = _load_again(config, source, kept, moments)
    if blocks.digest != kept.digest:
        raise InputError(
            f"the moments in {config.moments} are from other calibration tokens ({kept.spec}, {kept.digest[:12]}) "
            f"than the refinement uses ({blocks.spec}, {blocks.digest[:12]}): pass the same --calibration"
        )
    return blocks


def _load_again(config: PruneConfig, source: Checkpoint, kept: Calibration, moments: Path) -> Calibration:
    """Load the blocks that moments are of; the sequences that the model sampled are beside the moments."""
    spec = config.calibration or kept.pinned or kept.spec
    if (asked := sequences_asked(spec)) and asked != kept.generated:
        raise InputError(
            f"the moments in {config.moments} are of {kept.generated} sequences that the model sampled, {spec} asks "
            f"for {asked}: pass the same --calibration"
        )
    text = None if asked else _load_text(config, source, spec)
    if text and text.input_ids_BT.shape[1] != kept.block_length:
        raise InputError(
            f"the moments in {config.moments} are of blocks of {kept.block_length} tokens, {spec} has "
            f"{text.input_ids_BT.shape[1]}: pass the same --calibration and --sequence-length"
        )
    if text and not kept.generated:
        return Calibration.of(text)
    sampled = load_blocks(source, str(moments / GENERATED), TextOptions())
    return _joined(text.spec if text else spec, text, sampled.input_ids_BT)


def _load_text(config: PruneConfig, source: Checkpoint, spec: str) -> TokenBlocks:
    drawn = TextOptions(samples=config.samples, sequence_length=config.sequence_length, seed=config.seed)
    return load_blocks(source, spec, drawn)


def load_blocks(source: Checkpoint, spec: str, options: TextOptions) -> TokenBlocks:
    """Load token blocks for a model.

    Raises:
        DataError: The data spec does not give token blocks.
    """
    return load_tokens(
        spec,
        model_dir=source.directory,
        vocab_size=source.config.vocab_size,
        max_length=source.config.max_position_embeddings,
        options=options,
    )
