"""Measures what observing a layer costs, compared with a plain forward pass: `python -m benchmarks.observing`.

It uses one layer of random weights and blocks of 2048 tokens. The plain pass calls the layer's own module on the same
hidden states. `gram` passes a branch while it observes it. `slimllm` holds the activations until a decision is applied:
here, the attention stays whole and the MLP keeps its first 80 % of the channels.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from transformers import PretrainedConfig

from benchmarks.machine import describe_machine, figure, write_table
from benchmarks.random_model import Shape, write_model
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import Decision
from slimllm_ops.decide.recovery import Line
from slimllm_ops.stream.memory import return_large_blocks
from slimllm_ops.stream.outputs import LayerwiseStream

SHAPES = ((512, 1408, 8), (1024, 2816, 16), (2048, 5632, 16), (4096, 11008, 32))


@click.command()
@click.option(
    "--shape",
    "shapes",
    nargs=3,
    type=int,
    multiple=True,
    default=SHAPES,
    help="Hidden size, intermediate size and heads; repeatable.",
)
@click.option("--blocks", default=4, help="Blocks of tokens, two per batch.")
@click.option("--block-length", default=2048, help="Tokens per block.")
@click.option("--repeats", default=5, help="How often to time each way, after one untimed turn.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--output", type=Path, default=Path("benchmarks/results/observing.md"))
def main(
    shapes: tuple[tuple[int, int, int], ...], blocks: int, block_length: int, repeats: int, device: str, output: Path
) -> None:
    """Measure every width and write the table."""
    return_large_blocks()
    rows = [["hidden, intermediate", "plain, s", "gram, s", "slimllm, s", "gram, of plain", "slimllm, of plain"]]
    for hidden, intermediate, heads in shapes:
        with tempfile.TemporaryDirectory() as folder:
            shape = Shape(
                hidden=hidden, intermediate=intermediate, layers=1, heads=heads, kv_heads=heads // 4, vocabulary=1000
            )
            checkpoint = Checkpoint.open(write_model(Path(folder) / "model", shape))
            ids = torch.randint(1000, (blocks, block_length), generator=torch.Generator().manual_seed(0))
            stream = LayerwiseStream(checkpoint, list(ids.split(2)), torch.device(device))
            plain, gram, slimllm = _medians(stream, repeats)
        ratios = (figure(gram / plain), figure(slimllm / plain))
        rows.append([f"{hidden}, {intermediate}", figure(plain), figure(gram), figure(slimllm), *ratios])
        print(rows[-1], flush=True)
    title = f"Observing a layer, compared with a plain pass: {blocks} x {block_length} tokens on {device}"
    write_table(output, title, describe_machine(), rows)


def _medians(stream: LayerwiseStream, repeats: int) -> list[float]:
    """Return the median seconds of each way; they take turns, so other load on the machine slows all alike."""
    family = stream.checkpoint.family
    channels = _first_channels(stream.checkpoint.config)

    def plain() -> None:
        layer = stream._weights.load(0)
        with torch.inference_mode():
            for hidden in stream.hidden:
                layer(hidden, **stream._weights.call(0))

    def gram() -> None:
        for branch in (family.attention, family.mlp):
            stream.observe_dense(0, branch)

    def slimllm() -> None:
        stream.observe(0, family.attention)
        stream.apply(0, family.attention, None)
        stream.observe_output(0)
        stream.compare_outputs(0, channels.kept)
        stream.add_recovered(0, channels)

    ways: list[Callable[[], None]] = [plain, gram, slimllm]
    embedded = list(stream.hidden)
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, seconds in zip(ways, times, strict=True):
            stream.hidden = list(embedded)
            start = _now(stream.device)
            way()
            if turn:
                seconds.append(_now(stream.device) - start)
    return [statistics.median(seconds) for seconds in times]


def _first_channels(config: PretrainedConfig) -> Decision:
    """Return the decision that keeps the first 80 % of the channels, with a line that changes nothing."""
    num_channels, hidden = config.intermediate_size, config.hidden_size
    line = Line(torch.ones(hidden), torch.zeros(hidden), 0.0)
    return Decision(tuple(range(num_channels * 4 // 5)), (0.0,) * num_channels, line, 0.0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
