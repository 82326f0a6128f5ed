"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, CSV, and those of the user.

`Tracker` is what a tracker is, `find` chooses one by name, `feed.Feed` makes rows of a run and passes them on.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

KNOWN = {
    "csv": "offbeat.tracking.table:CSV",
    "tensorboard": "offbeat.tracking.tensorboard:TensorBoard",
    "wandb": "offbeat.tracking.wandb:WandB",
    "mlflow": "offbeat.tracking.mlflow:MLflow",
}
"""Where the trackers of this library are."""


class Tracker(ABC):
    """Where the figures of one run go. What a method raises is told once, and the run goes on."""

    needs: ClassVar[str] = ""
    """The module that must be installed for it; it is an extra of the same name, or of ``extra``."""
    extra: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        """Begin a run called ``name``, whose results are in ``folder``, with these ``parameters``: the method, the seed, ..."""

    @abstractmethod
    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        """Figures by name, all finite, after so many gradients and so many seconds; both grow from call to call."""

    def close(self) -> None:
        """No more figures will come."""


def find(name: str) -> type[Tracker]:
    """The tracker called ``name``, or, as ``module:Class``, one of the user's own. ``ValueError`` where there is none, and
    ``ImportError`` where it needs a package that is not installed."""
    place = KNOWN.get(name, name)
    module, colon, cls = place.partition(":")
    if not colon:
        raise ValueError(
            f"--track {name}: there is no such tracker; choose of {', '.join(KNOWN)}, or give MODULE:CLASS of your own"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a command has none of the folder that it was started in
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--track {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise ValueError(f"--track {name}: {cls} must be a class derived from offbeat.tracking.Tracker")
    if found.needs and importlib.util.find_spec(found.needs) is None:
        extra = f"pip install 'offbeat[{found.extra or found.needs}]'" if name in KNOWN else f"install {found.needs}"
        raise ImportError(f"--track {name} needs {found.needs}: {extra}")
    return found
