"""MLflow."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Tracker

MOST = 1000
"""Figures that MLflow takes in one call, each of which may take a twentieth of a second."""


class MLflow(Tracker):
    """A run of MLflow at ``MLFLOW_TRACKING_URI``, else in ``mlflow.db`` of the run's folder, a file of SQLite, as MLflow takes no plain
    folder any more: `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`. ``MLFLOW_EXPERIMENT_NAME`` names the experiment, else
    it is "offbeat"."""

    needs = "mlflow"

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("alembic").setLevel(logging.WARNING)  # which tells each table of a new file
        here = folder.resolve()
        self._metric, self._waiting, self._sent = Metric, list[Any](), time.monotonic()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}")
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "offbeat")
        found = self._client.get_experiment_by_name(experiment)
        own = None if "MLFLOW_TRACKING_URI" in os.environ else (here / "mlartifacts").as_uri()
        number = found.experiment_id if found else self._client.create_experiment(experiment, own)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        now = time.time_ns() // 1_000_000
        named = {**figures, "seconds": seconds}
        self._waiting += [
            self._metric(re.sub(r"[^\w\-. /]", "_", key), value, now, gradients) for key, value in named.items()
        ]
        if len(self._waiting) > MOST - len(named) or time.monotonic() - self._sent > 1.0:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run)

    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for k in range(0, len(waiting), MOST):
            self._client.log_batch(self._run, metrics=waiting[k : k + MOST])
