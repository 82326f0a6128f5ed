"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Tracker


class WandB(Tracker):
    """A run of Weights & Biases, with its files in ``wandb/`` of the run's folder. It is online where ``WANDB_MODE`` says so or there is a
    key; else offline, to be uploaded later by `wandb sync`. ``WANDB_PROJECT`` names the project, else it is "offbeat"."""

    needs = "wandb"

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        import wandb

        key = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "offbeat"),
            dir=folder,
            name=name,
            config=dict(parameters),
            mode=None if "WANDB_MODE" in os.environ or key else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="gradients")

    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        self._run.log({"gradients": gradients, "seconds": seconds, **figures})

    def close(self) -> None:
        self._run.finish()
