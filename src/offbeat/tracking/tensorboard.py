"""TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Tracker


class TensorBoard(Tracker):
    """Event files in ``tensorboard/`` of the run's folder, in place of those of an earlier time: `tensorboard --logdir FOLDER`."""

    needs = "tensorboard"

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        lines = "\n".join(f"| {key} | `{value}` |" for key, value in parameters.items())
        self._writer.add_text("parameters", f"| parameter | {name} |\n|---|---|\n{lines}")

    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, gradients)

    def close(self) -> None:
        self._writer.close()
