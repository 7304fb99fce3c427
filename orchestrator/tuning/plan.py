"""Plans a training before it starts (`slimllm tune --dry-run`): estimates it and runs the checks."""

from dataclasses import replace

from orchestrator.output.destination import is_whole
from orchestrator.output.staging import require_can_start
from orchestrator.preflight.dry_run import RunPlan
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import backend_of
from orchestrator.tuning.config import TuneConfig
from orchestrator.tuning.estimate import plan_training
from orchestrator.tuning.inputs import load_tune_inputs
from orchestrator.tuning.params import what_is_asked
from orchestrator.tuning.tune import require_sharing, tuned_output


def plan_tuning(config: TuneConfig, reporter: Reporter | None = None) -> RunPlan | None:
    """Return what `tune` would do and take; None if it is already done. Compute, write and log nothing.

    Raises:
        ConfigError, DataError, InputError, ClusterError: The settings cannot be met.
    """
    reporter = reporter or Reporter()
    inputs = load_tune_inputs(config, reporter.warn)
    output, asked = tuned_output(config, inputs), what_is_asked(config, inputs)
    if config.resume and is_whole(output, asked):
        reporter.note(f"{output.place} is finished: there is nothing to resume")
        return None
    require_can_start(output.directory, config.overwrite, asked, config.resume)
    backend = backend_of(config)
    with backend.session(verbose=reporter.verbose) as resources:
        workers = backend.plan_workers(resources)
        require_sharing(config, workers)
        return replace(plan_training(config, inputs, output.directory, resources, workers), output=output.place)
