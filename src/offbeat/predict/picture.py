"""The picture of predictions: gradients per second and waiting over the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import LIGHT, Theme, canvas, label_ends, png, styles
from .fit import Fit
from .model import Prediction


def draw(fit: Fit, predictions: Sequence[Prediction], folder: Path) -> Path:
    """Write ``predict.png`` into ``folder``; its path."""
    path = folder / "predict.png"
    path.write_bytes(png(lambda theme: _picture(fit, predictions, theme), LIGHT))
    return path


def _picture(fit: Fit, predictions: Sequence[Prediction], theme: Theme) -> Any:
    looks = styles(dict.fromkeys(p.method for p in predictions), theme)
    workers = sorted({p.workers for p in predictions} | {fit.workers})
    picture = canvas(11, 4.6)
    rates, waits = picture.subplots(1, 2)
    ends: dict[str, tuple[float, float]] = {}
    for label, look in looks.items():
        mine = sorted((p.workers, p.rate, 100 * p.waiting) for p in predictions if p.method == label)
        n, rate, waiting = zip(*mine, strict=True)
        style = {"color": look.color, "ls": look.linestyle, "marker": look.marker, "lw": 1.8, "ms": 5}
        rates.plot(n, rate, **style)
        waits.plot(n, waiting, **style)
        ends[label] = n[-1], waiting[-1]
    rates.set_yscale("log")
    top = 2 * max(fit.rate, *(p.rate for p in predictions))
    each = fit.rate / fit.workers
    last = min(workers[-1], top / each)
    line = [each * workers[0], each * last]
    rates.plot([workers[0], last], line, color=theme.faint, ls=":", lw=1.2, label="in proportion to the record")
    for axes, measured in ((rates, fit.rate), (waits, 100 * fit.waiting)):
        axes.plot(fit.workers, measured, "*", color=theme.ink, ms=13, zorder=5, label="recorded")
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers, [str(n) for n in workers])
        axes.set_xlabel("workers")
        axes.grid(axis="y")
    rates.set_title("gradients per second")
    waits.set_title("share of time spent waiting, %")
    waits.set_ylim(-3, 103)
    rates.legend(frameon=False, loc="upper left")
    label_ends(waits, ends, looks)
    return picture
