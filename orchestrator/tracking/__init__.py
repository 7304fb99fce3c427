"""Logs a run to MLflow and to a journal, which is written first and is enough to log the run later.

    with tracked_run(TrackingOptions(), output / "pruning" / "metrics.jsonl") as run:
        run.log_params({"sparsity": 0.2})
        run.log_metrics({"heads_kept": 24}, step=layer)
        run.log_checkpoint(output, "pruned", params={"sparsity": 0.2})

Each thing logged is an event, one line of JSON in the journal. MLflow gets events from the journal: as they are logged,
when a killed run resumes, and when `log_output` logs a run whose server was lost. A key in the journal and in the run's
tags identifies the run in MLflow. The whole journal is sent again, and MLflow keeps each event once. If the server does
not answer, one warning is printed and the run goes on.

MLflow is imported at the first call (2 s), and not at all if the tracking URI is "none": such a run has only its
journal. Every call names its run: there is no active run, no global URI.
"""

from orchestrator.tracking.finished_run import LoggedOutput, how_to_log, log_output, where_to_look
from orchestrator.tracking.options import JOURNAL_ONLY, TrackingError, TrackingOptions, database_file
from orchestrator.tracking.run import Run, stored_parent, tracked_run

__all__ = [
    "JOURNAL_ONLY",
    "LoggedOutput",
    "Run",
    "TrackingError",
    "TrackingOptions",
    "database_file",
    "how_to_log",
    "log_output",
    "stored_parent",
    "tracked_run",
    "where_to_look",
]
