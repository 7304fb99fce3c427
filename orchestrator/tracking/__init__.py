"""A run in MLflow, with a journal beside it that is written first and is enough to log the run later.

    with tracked_run(TrackingOptions(), output / "pruning" / "metrics.jsonl") as run:
        run.log_params({"sparsity": 0.2})
        run.log_metrics({"heads_kept": 24}, step=layer)
        run.log_checkpoint(output, "pruned", params={"sparsity": 0.2})

Whatever is logged is one event, a line of JSON in the journal, and is told to MLflow from there: when it is logged,
when a run that was killed goes on, and when a run whose server was lost is logged by `log_output`. All of them find
the run that is there by a key in the journal and in the run's tags, and tell it the whole journal again, of which
MLflow keeps each event once. A server that does not answer costs one warning: the run goes on.

MLflow is imported at the first call (2 s). Every call names its run: there is no active run, no global URI.
"""

from orchestrator.tracking.finished_run import LoggedOutput, how_to_log, log_output, where_to_look
from orchestrator.tracking.options import TrackingError, TrackingOptions, database_file
from orchestrator.tracking.run import Run, tracked_run

__all__ = [
    "LoggedOutput",
    "Run",
    "TrackingError",
    "TrackingOptions",
    "database_file",
    "how_to_log",
    "log_output",
    "tracked_run",
    "where_to_look",
]
