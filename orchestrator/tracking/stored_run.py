"""Sends a journal's events to one run in MLflow."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.tracking.mlflow_private import system_monitors
from orchestrator.tracking.reach import QUICK_SECONDS
from orchestrator.tracking.registry import Registry
from orchestrator.tracking.signals import defer_signals

SAMPLING_SECONDS = 2.0
# A server that forwards a large file to its object store answers only after the whole file has arrived there.
UPLOAD_SECONDS = "120"
MAX_DIGEST = 36
PARENT_TAG = "mlflow.parentRunId"
# The tag that a run's page shows as its description.
NOTE_TAG = "mlflow.note.content"


class StoredRun:
    """A run in MLflow, addressed by its id. Every method raises what MLflow raises.

    A run that was found again may already have some of the data; nothing is added to it twice.
    """

    def __init__(self, client: Any, uri: str, experiment_id: str, run: Any, found_again: bool) -> None:
        self._client, self._experiment_id, self._found_again = client, experiment_id, found_again
        self.run_id, self.status, self._begun = run.info.run_id, run.info.status, run.info.start_time
        self.params: dict[str, str] = dict(run.data.params)
        self.registry = Registry(client, uri, self.run_id, found_again)
        self._totals: list[Any] = []
        self._model_id: str | None = None

    def resume(self, run_name: str | None, parent_id: str | None) -> None:
        """Set the run to RUNNING again, under a parent that may be new."""
        self._client.update_run(self.run_id, status="RUNNING", name=run_name)
        if parent_id:
            self._client.set_tag(self.run_id, PARENT_TAG, parent_id)

    def tell(self, event: dict[str, Any]) -> None:
        """Log one line of a journal."""
        with defer_signals():
            match event["event"]:
                case "params":
                    self._tell_params({key: str(value) for key, value in event["params"].items()})
                case "metrics":
                    self._tell_metrics(event)
                case "dataset":
                    self._tell_dataset(event)
                case "evaluated":
                    self._tell_maker(event)
                case "note":
                    self._client.set_tag(self.run_id, NOTE_TAG, event["text"])
                case "tags":
                    for key, value in event["tags"].items():
                        self._client.set_tag(self.run_id, key, value)
                case "end":
                    self._client.set_terminated(self.run_id, event["status"], end_time=_stamp(event))

    def _tell_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        changed = [key for key, value in params.items() if self.params.get(key, value) != value]
        # MLflow would refuse all of them if one already had another value.
        fitting = {key: value for key, value in params.items() if key not in changed}
        self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in fitting.items()])
        self.params |= fitting
        if changed:
            values = ", ".join(f"{key} stays {self.params[key]}, now {params[key]}" for key in changed)
            raise MlflowException.invalid_parameter_value(f"a parameter cannot be changed: {values}")

    def _tell_metrics(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        step, total = event["step"] or 0, event["step"] is None
        # Infinity and NaN stay in the journal, as "inf" and null: MLflow stores them as 1.8e308 and 0, which
        # spoil every chart and look like measurements.
        finite = {key: value for key, value in event["metrics"].items() if isinstance(value, int | float)}
        model_id = self._model_id if total else None
        metrics = [Metric(k, v, _stamp(event), step, model_id=model_id) for k, v in finite.items()]
        self._client.log_batch(self.run_id, metrics=metrics)
        if total:
            self._totals += metrics

    def _tell_maker(self, event: dict[str, Any]) -> None:
        """Log measurements of a model to the run that made it, to its logged model, and as tags of its versions."""
        from mlflow.entities import Metric

        maker, stamp = event["run_id"], _stamp(event)
        values = {key: value for key, value in event["metrics"].items() if isinstance(value, int | float)}
        self._client.log_batch(maker, metrics=[Metric(key, value, stamp, 0) for key, value in values.items()])
        for model in self._client.search_logged_models([self._experiment_id], f"source_run_id = '{maker}'"):
            linked = [Metric(key, value, stamp, 0, model_id=model.model_id) for key, value in values.items()]
            self._client.log_batch(maker, metrics=linked)
        for version in self._client.search_model_versions(f"run_id = '{maker}'"):
            for key, value in values.items():
                self._client.set_model_version_tag(version.name, version.version, key, f"{value:.4g}")

    def _tell_dataset(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        blocks, length = event["n_blocks"], event["block_length"]
        # A journal of an older version has no number of tokens, and its blocks no padding.
        tokens = event.get("n_tokens", blocks * length)
        dataset = Dataset(
            name=event["name"],
            # MLflow accepts 36 characters; `source` has the whole digest.
            digest=event["digest"][:MAX_DIGEST],
            source_type="slimllm",
            source=json.dumps({"source": event["source"], "digest": event["digest"]}),
            profile=json.dumps({"num_rows": blocks, "num_elements": tokens, "block_length": length}),
        )
        context = InputTag("mlflow.data.context", event["context"])
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [context])])

    def upload(self, paths: Sequence[Path], folder: str | None) -> bool:
        """Copy files, and the visible files of directories, to the run's artifacts."""
        with self._upload_timeout():
            for path in paths:
                if not path.is_dir():
                    self._client.log_artifact(self.run_id, str(path), folder)
                    continue
                with _link_visible_files(path) as links:
                    self._client.log_artifacts(self.run_id, str(links), folder)
        return True

    def upload_model(self, directory: Path, name: str, params: dict[str, Any]) -> str:
        """Copy a directory's files to a logged model, byte for byte, without loading the model; return its id."""
        from mlflow.entities import LoggedModelOutput, Metric

        if (model := self.find_model(name)) is None:
            model = self._client.create_logged_model(
                self._experiment_id,
                name=_model_name(name),
                source_run_id=self.run_id,
                params={key: str(value) for key, value in params.items()},
                model_type="causal-lm",
            )
        if model.status != "READY":
            self._fill_model(model.model_id, directory)
        if model.model_id not in self._linked_models():
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        # With the same key, time, step and value, the store links the metrics and adds no second point to the run.
        self._model_id = model.model_id
        linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=self._model_id) for m in self._totals]
        self._client.log_batch(self.run_id, metrics=linked)
        return model.model_id

    def _fill_model(self, model_id: str, directory: Path) -> None:
        try:
            with self._upload_timeout(), _link_visible_files(directory) as links:
                self._client.log_model_artifacts(model_id, str(links))
        except BaseException:
            with suppress(Exception):
                self._client.finalize_logged_model(model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model_id, "READY")

    def find_model(self, name: str) -> Any | None:
        """Return the logged model of this name that an earlier attempt created, complete or not."""
        if not self._found_again:
            return None
        named = f"source_run_id = '{self.run_id}' AND name = '{_model_name(name)}'"
        found = self._client.search_logged_models([self._experiment_id], named)
        return found[0] if found else None

    def _linked_models(self) -> set[str]:
        if not self._found_again:
            return set()
        outputs = self._client.get_run(self.run_id).outputs
        return {output.model_id for output in outputs.model_outputs} if outputs else set()

    def sample_system(self, stop: threading.Event) -> None:
        """Log processor, memory, disk, network and GPU use every two seconds, until `stop` is set or a call fails."""
        from mlflow.entities import Metric

        monitors = system_monitors()
        while not stop.wait(SAMPLING_SECONDS):
            values: dict[str, float] = {}
            with suppress(Exception):
                for monitor in monitors:
                    monitor.collect_metrics()
                    values.update(monitor.aggregate_metrics())
                    monitor.clear_metrics()
            now = int(time.time() * 1000)
            # Steps count from the start of the run, so a resumed attempt continues after a gap.
            step = int((now - self._begun) / (1000 * SAMPLING_SECONDS))
            try:
                metrics = [Metric(f"system/{key}", value, now, step) for key, value in values.items()]
                self._client.log_batch(self.run_id, metrics=metrics)
            except Exception:
                # The run's next own call fails too, and warns.
                return

    @contextmanager
    def _upload_timeout(self) -> Iterator[None]:
        """Allow an upload more time than other calls, if the server answers and the user set no limit."""
        self._client.get_run(self.run_id)
        if os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] != QUICK_SECONDS:
            yield
            return
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = UPLOAD_SECONDS
        try:
            yield
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = QUICK_SECONDS


@contextmanager
def _link_visible_files(directory: Path) -> Iterator[Path]:
    """Yield a folder of links to a directory's visible files; hidden ones may belong to a run that can resume.

    MLflow can upload a folder or a file to a model, but not a file into one of its folders.
    """
    with TemporaryDirectory() as folder:
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(directory.absolute(), folder, ignore=hidden, copy_function=os.symlink, dirs_exist_ok=True)
        yield Path(folder)


def _model_name(name: str) -> str:
    # MLflow forbids some characters, such as the dots in Llama-3.1-8B.
    return re.sub(r"[/:.%\"']", "-", name)


def _stamp(event: dict[str, Any]) -> int:
    return int(event["time"] * 1000)
