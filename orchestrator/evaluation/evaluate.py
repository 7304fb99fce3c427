"""Evaluates models from start to end: from models, texts and tasks to tables and their record in MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.group import ShardGroup
from orchestrator.evaluation.asking import Ask, TaskOptions, prepare_tasks, require_shared_files, task_names
from orchestrator.evaluation.config import EvaluateConfig
from orchestrator.evaluation.inputs import Evaluated, EvaluationInputs, load_evaluation_inputs
from orchestrator.evaluation.perplexity import measure_texts
from orchestrator.evaluation.record import evaluation_params, log_inputs, log_results, write_run_file
from orchestrator.evaluation.results import ModelResult, TaskResult, TextResult, compare_answers
from orchestrator.evaluation.table import as_markdown, write_tables
from orchestrator.output.staging import open_staging
from orchestrator.progress import Reporter
from orchestrator.pruning.backends import backend_of
from orchestrator.pruning.run_context import open_session, open_shards, settle_workers
from orchestrator.tracking import TrackingOptions, tracked_run
from orchestrator.tracking.ray_job import link_with_job, require_lasting_output


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation: the figures of each model, the first model's first."""

    output: Path
    models: tuple[ModelResult, ...]
    tracking_uri: str | None
    experiment_id: str | None
    run_id: str | None


def evaluate(config: EvaluateConfig, reporter: Reporter | None = None) -> Evaluation:
    """Evaluate models; `slimllm evaluate` calls this too.

    Raises:
        ConfigError, DataError, InputError, ClusterError, TrackingError: The settings cannot be met; nothing is left
            behind.
        ShardError: Workers were lost too often.

    Example:
        evaluation = evaluate(EvaluateConfig(models=("dense", "pruned"), data=("heldout.txt",)))
        print(evaluation.models[1].texts[0].perplexity)
    """
    reporter = reporter or Reporter()
    require_lasting_output(config.output, tracking_options(config, None))
    ask = prepare_tasks(task_options(config))
    backend = backend_of(config)
    backend.require_place()
    inputs = load_evaluation_inputs(config, reporter.warn)
    output = Path(config.output or f"evaluations/{Path(inputs.first.name).name}")
    with (
        open_staging(output, config.overwrite) as staging,
        open_session(backend, staging, reporter) as resources,
        tracked_run(tracking_options(config, inputs), staging.directory / "metrics.jsonl", reporter.warn) as run,
    ):
        workers = settle_workers(backend, resources, staging)
        require_shared_files(workers)
        params = evaluation_params(config, inputs, workers)
        log_inputs(run, params, inputs)
        link_with_job(run, reporter.warn)
        run_file = write_run_file(staging.directory, config, inputs, workers)
        with open_shards(backend, resources, workers, staging, reporter, offload=False) as (_, shards):
            texts = measure_texts(shards, inputs, reporter)
            tasks = _ask_each(ask, shards, inputs, reporter) if ask else {}
        results = tuple(_result(one, texts, tasks) for one in inputs.models)
        run.log_note(as_markdown(results))
        run.log_artifacts(run_file, *write_tables(results, {"params": params}, staging.directory))
        log_results(run, inputs, results)
        return Evaluation(
            output=output,
            models=results,
            tracking_uri=run.tracking_uri,
            experiment_id=run.experiment_id,
            run_id=run.run_id,
        )


def task_options(config: EvaluateConfig) -> TaskOptions:
    """Return the tasks of a config."""
    return TaskOptions(
        names=task_names(config.tasks),
        folder=config.task_folder,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
    )


def tracking_options(config: EvaluateConfig, inputs: EvaluationInputs | None) -> TrackingOptions:
    """Return the tracking options of a config."""
    name = config.run_name or (None if inputs is None else f"{inputs.first.name}-evaluation")
    return TrackingOptions(experiment=config.experiment, tracking_uri=config.tracking_uri, run_name=name)


def _ask_each(
    ask: Ask, shards: ShardGroup, inputs: EvaluationInputs, reporter: Reporter
) -> dict[str, tuple[TaskResult, ...]]:
    """Ask every model; return the results by the models' names."""
    answers = {one.name: ask(shards, one.whole, one.name, reporter) for one in inputs.models}
    first = answers[inputs.first.name]
    return {name: compare_answers(one, None if name == inputs.first.name else first) for name, one in answers.items()}


def _result(
    model: Evaluated, texts: Mapping[str, tuple[TextResult, ...]], tasks: Mapping[str, tuple[TaskResult, ...]]
) -> ModelResult:
    return ModelResult(
        name=model.name,
        digest=model.digest,
        parameters=model.whole.num_parameters,
        texts=texts[model.name],
        tasks=tasks.get(model.name, ()),
    )
