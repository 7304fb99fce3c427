"""Perplexity on held-out blocks, sharded over the workers, a layer at a time."""

import math

from actors.group import ShardGroup
from orchestrator.data import TokenBlocks
from orchestrator.output.staging import Staging
from orchestrator.progress import Reporter
from orchestrator.pruning.attempts import attempts
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.stream.passes import LayerStream

# exp() of a larger loss overflows a float; a heavily pruned model can reach it.
LARGEST_LOSS = 700


def measure_once(
    shards: ShardGroup,
    staging: Staging,
    reporter: Reporter,
    model: Checkpoint,
    blocks: TokenBlocks,
    stage: str,
    name: str,
) -> float:
    """Return a model's perplexity; a resumed run does not measure it again.

    Args:
        shards: The shards to measure on.
        staging: What holds the results so far.
        reporter: Shows the progress.
        model: The model.
        blocks: Held-out blocks.
        stage: The name of the pass in progress lines.
        name: The model's name in the staging's results.
    """

    def measure() -> float:
        for attempt in attempts(shards, reporter):
            with attempt:
                perplexity = evaluate(shards, model, blocks, reporter, stage)
        return perplexity

    return float(staging.results.once(f"perplexity of {name} on {blocks.spec}, {blocks.digest}", measure))


def evaluate(shards: ShardGroup, model: Checkpoint, blocks: TokenBlocks, reporter: Reporter, stage: str) -> float:
    """Return the perplexity of a model: exp of the mean negative log-likelihood per token.

    Raises:
        NonFiniteError: A layer's activations, or the logits, hold NaN or infinity.
    """
    shards.open_stream(stage, model, blocks.input_ids_BT)
    for layer in reporter.layers(stage, model.num_layers, blocks.input_ids_BT.size):
        shards.each(stage, LayerStream.forward, layer)
    loss = shards.mean(stage, LayerStream.negative_log_likelihood)
    shards.close_stream(stage)
    if math.isnan(loss):
        raise NonFiniteError(
            f"{stage}: the logits on {blocks.spec} hold NaN or infinity: "
            f"the weights of the final norm or of the head overflow, or are damaged"
        )
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf
