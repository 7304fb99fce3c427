"""The last steps for a target whose layers are written: refine, read back, measure, count."""

from orchestrator.evaluation.results import TaskResult, compare_answers
from orchestrator.pruning.refine import refine_model
from orchestrator.pruning.run_context import RunContext
from orchestrator.pruning.targets import Target
from orchestrator.record.totals import Totals, count_totals
from slimllm_ops.checkpoint import tokenizer
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.read_back import read_back, require_outside_unchanged


def complete(context: RunContext, target: Target) -> Totals:
    """Finish a target's checkpoint, refine it if the config asks, read it back, and measure it."""
    pruned = target.pruned.finish()
    if target.refined is not None:
        refine_model(context, target, pruned)
        pruned = target.refined.finish()
    with context.reporter.timed("read back"):
        require_outside_unchanged(context.inputs.source, pruned)
        probe = target.final.log.probe()
        error = read_back(pruned, probe.ids_T, probe.states_TD, context.shards.compute_dtype)
        tokenizer.require_same(context.source.directory, pruned.directory)
    name = str(target.directory.relative_to(context.staging.directory))
    perplexity = {
        blocks.spec: (context.dense_perplexity(blocks), context.perplexity(pruned, blocks, "perplexity, pruned", name))
        for blocks in context.inputs.held_out
    }
    tasks = _ask(context, pruned, name)
    peak_memory = context.shards.peak_memory()
    return count_totals(context.inputs, pruned, perplexity, tasks, context.reporter.seconds, peak_memory, error)


def _ask(context: RunContext, pruned: Checkpoint, name: str) -> tuple[tuple[TaskResult, TaskResult], ...]:
    """Return the dense and the pruned model's result for each metric of the run's tasks."""
    dense = context.dense_answers()
    return tuple(zip(compare_answers(dense, None), compare_answers(context.answers(pruned, name), dense), strict=True))
