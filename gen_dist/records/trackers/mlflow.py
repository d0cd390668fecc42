"""Curves, histograms, pictures and options of a run on MLflow: at $MLFLOW_TRACKING_URI, else in RUN/mlflow.

To see the latter: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/runs.db`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gen_dist.records.run_paths import RunPaths
from gen_dist.records.trackers.base import RunToTrack, RunTracker, Values, histogram, missing_package, register

_IDENTITY = "gen_dist.run"
"""Tag with the identity of our run, by which a later start finds it."""


class Mlflow(RunTracker):
    """A run of MLflow. It cannot take a figure back, so what an earlier start sent of a step is not sent again."""

    def __init__(self, run: RunToTrack) -> None:
        """Find the run of an earlier start, or create it with its options as parameters.

        Raises:
            ConfigError: MLflow is not installed.
        """
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise missing_package("mlflow", "mlflow-skinny sqlalchemy alembic") from None
        # A client of its own: a run that the user's own code has open stays as it is.
        elsewhere, here = os.environ.get("MLFLOW_TRACKING_URI"), RunPaths(run.path).mlflow.resolve()
        if not elsewhere:
            here.mkdir(exist_ok=True)
        self._client: Any = MlflowClient(tracking_uri=elsewhere or f"sqlite:///{quote(str(here))}/runs.db")
        artifacts = None if elsewhere else (here / "artifacts").as_uri()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "gen_dist", artifacts)
        found = self._client.search_runs([experiment], f"tags.`{_IDENTITY}` = '{run.run_id}'", max_results=1)
        self._id = found[0].info.run_id if found else self._create(experiment, run)
        self._sent = {name: self._last_step(name) for name in found[0].data.metrics} if found else {}
        """Last step that was sent, by name."""
        if found:
            self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Values) -> None:
        """See RunTracker. Histograms are artifacts: a JSON of edges and heights."""
        for name, value in values.items():
            if not isinstance(value, float | int):
                heights, edges = histogram(name, value)
                self._client.log_dict(
                    self._id, {"edges": edges, "heights": heights}, f"histograms/{name}/step_{step:08d}.json"
                )
            elif step > self._sent.get(name, -1):
                self._client.log_metric(self._id, name, float(value), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """See RunTracker."""
        for name, path in pictures.items():
            self._client.log_artifact(self._id, str(path), f"pictures/{name}")

    def finish(self, exit_code: int) -> None:
        """See RunTracker."""
        self._client.set_terminated(self._id, "FAILED" if exit_code else "FINISHED")

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        identity: str = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        return identity

    def _create(self, experiment: str, run: RunToTrack) -> str:
        created: str = self._client.create_run(
            experiment, tags={_IDENTITY: run.run_id}, run_name=run.path.name
        ).info.run_id
        for name, value in _flat(dataclasses.asdict(run.config)):
            self._client.log_param(created, name, str(value)[:500])
        return created

    def _last_step(self, name: str) -> int:
        return max((one.step for one in self._client.get_metric_history(self._id, name)), default=-1)


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


register("mlflow", Mlflow)
