"""Lists the modules that a budget can be spent on, from their shapes and the results of one calibration pass."""

from collections.abc import Sequence

from slimllm_ops.allocate.budget import Candidate
from slimllm_ops.allocate.layer_size import LayerSize
from slimllm_ops.decide.paths import LayerPaths
from slimllm_ops.models.pair import Pair
from slimllm_ops.moments.ranking import Ranking


def module_candidates(
    sizes: Sequence[LayerSize], paths: Sequence[LayerPaths], rankings: Sequence[Pair[Ranking]]
) -> list[Pair[Candidate]]:
    """Return the modules of each layer as candidates for a budget.

    Args:
        sizes: The size of each layer.
        paths: The results of the calibration pass for each layer.
        rankings: The order in which a method removes each layer's heads and channels.
    """
    return [
        Pair(
            Candidate(
                layer=layer,
                ranking=ranking.attention,
                unit_parameters=size.unit_parameters,
                bias_parameters=size.attention_bias_parameters,
                output_variance=path.attention.output_variance,
                stream_power=path.stream_power,
                limit=size.limit,
            ),
            Candidate(
                layer=layer,
                ranking=ranking.mlp,
                unit_parameters=size.channel_parameters // size.num_experts,
                bias_parameters=size.mlp_bias_parameters,
                output_variance=path.mlp.output_variance,
                stream_power=path.stream_power,
                units_at_once=size.num_experts,
                limit=size.limit,
            ),
        )
        for layer, (size, path, ranking) in enumerate(zip(sizes, paths, rankings, strict=True))
    ]
