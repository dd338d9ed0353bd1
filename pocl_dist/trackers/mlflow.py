"""MLflow: a tracking server, or files in `trackers/mlflow`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

from pocl_dist.trackers.base import TrackedRun, under

MAX_PARAMS = 100  # of one request
MAX_LENGTH = 6000  # of a parameter's value


class MlflowTracker:
    """A run of MLflow, by its client: nothing global is set."""

    can_rewrite = False  # a metric keeps every value that it ever had at a step

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # The local store, which needs no database, wants to be asked for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        uri = run.settings.mlflow_uri or run.folder.resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if run.run_id is not None:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        project = run.settings.project
        found = self._client.get_experiment_by_name(project)
        experiment = (
            self._client.create_experiment(project) if found is None else found.experiment_id
        )
        created = self._client.create_run(experiment, run_name=run.name)
        self.run_id = created.info.run_id
        self._log_config(run)

    def _log_config(self, run: TrackedRun) -> None:
        from mlflow.entities import Param

        params = [
            Param(key, value if isinstance(value, str) else json.dumps(value)[:MAX_LENGTH])
            for key, value in run.config.items()
        ]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers in one request."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, step) for key, value in under(kind, values).items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Says that this attempt has ended."""
        self._client.set_terminated(self.run_id, "FINISHED")
