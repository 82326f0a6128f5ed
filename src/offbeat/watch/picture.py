"""What a page draws, and what a monitoring system reads, of a `View`: bounded, however long the run is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .curve import Curve
from .status import Status
from .view import View, WorkerView

SHOWN = 60
"""Things that happened, and lines of the launcher, which are shown, at most."""


UNWRITTEN = 1.0
"""Seconds by which a trace may be behind its run."""


def now(view: View, status: Status) -> float:
    """The run's clock, in seconds, as far as its trace must have come: it goes on where nothing happens."""
    return max(view.seconds, (status.seconds or 0.0) - UNWRITTEN)


def left(view: View, status: Status) -> float:
    """Seconds until all minibatches are used, at the rate of late; nan where that is not known."""
    done, rate = float(status.said.get("minibatches", 0)), view.rate(now(view, status))
    if not (status.total and done and rate) or status.over:
        return math.nan
    return max(0.0, status.total - done) / float(
        rate * done / max(1, view.gradients)
    )  # a gradient may be of several minibatches


def picture(view: View, status: Status, name: str, log: Sequence[str] = ()) -> dict[str, Any]:
    """All that the page shows of a run; ``log`` are the last lines of its launcher. Numbers have four digits."""
    clock = now(view, status)
    every = {"all": view.curve} | {str(n): w.curve for n, w in sorted(view.workers.items()) if w.curve is not None}
    figures = sorted({figure for _, _, figures in view.evaluations for figure in figures})
    header = view.header
    return {
        "name": name,
        "phase": status.phase,
        "over": status.over,
        "method": header.get("method", ""),
        "about": {
            key: header[key] for key in ("problem", "parameters", "dtype", "seed", "transport") if header.get(key)
        },
        "seconds": _short(clock),
        "left": _short(left(view, status)),
        "gradients": view.gradients,
        "done": status.said.get("minibatches", view.gradients),
        "total": status.total,
        "rate": _short(view.rate(clock)),
        "loss": _short(view.loss),
        "alive": len(view.alive),
        "launched": max(status.said.get("launched") or 0, len(view.workers)),
        "crashes": view.crashes,
        "workers": [_worker(n, worker, clock) for n, worker in sorted(view.workers.items())],
        "curves": {key: _curve(curve, clock) for key, curve in every.items()},
        "evaluations": {f: [[_short(s), _short(v.get(f, math.nan))] for s, _, v in view.evaluations] for f in figures},
        "happened": list(view.happened)[-SHOWN:],
        "log": list(log)[-SHOWN:],
    }


def _worker(number: int, worker: WorkerView, clock: float) -> dict[str, Any]:
    return {
        "worker": number,
        "alive": worker.alive,
        "gradients": worker.gradients,
        "rate": _short(worker.rate(clock)),
        "lag": worker.lag,
        "gap": _short(worker.gap),
        "loss": _short(worker.loss),
        "crashed": worker.crashed,
        "restarts": max(0, worker.joined - 1),
        "silent": _short(clock - worker.moments[-1]) if worker.moments else None,
        "lives": [[_short(life.since), _short(life.until), life.how] for life in worker.lives],
    }


def _curve(curve: Curve, clock: float) -> dict[str, Any]:
    """The middles of the bins, and what each has; the last one, as far as it goes."""
    bins = curve.until(clock)
    width = curve.width
    if len(bins) > 1 and clock - (len(bins) - 1) * width < width / 2:  # too short to tell a rate
        bins = bins[:-1]
    means = [one.means() for one in bins]
    spans = [min(width, clock - k * width) or width for k in range(len(bins))]
    return {
        "seconds": [_short(k * width + span / 2) for k, span in enumerate(spans)],
        "rate": [_short(one.gradients / span) for one, span in zip(bins, spans, strict=True)],
        **{name: [_short(m[name]) for m in means] for name in ("loss", "lag", "lag_max", "gap")},
    }


def _short(value: float | None) -> float | None:
    """To four digits, and seconds of long runs to whole ones."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def metrics(view: View, status: Status) -> str:
    """The run in the text format of Prometheus, version 0.0.4."""
    return "".join(_lines(view, status))


def _lines(view: View, status: Status) -> Iterator[str]:
    clock, workers = now(view, status), sorted(view.workers.items())

    def family(name: str, kind: str, about: str, *samples: tuple[str, float]) -> Iterator[str]:
        known = [(labels, value) for labels, value in samples if math.isfinite(value)]
        if known:
            yield f"# HELP offbeat_{name} {about}\n# TYPE offbeat_{name} {kind}\n"
            yield from (f"offbeat_{name}{labels} {float(value)!r}\n" for labels, value in known)

    def each(what: Any) -> list[tuple[str, float]]:
        return [(f'{{worker="{number}"}}', float(what(worker))) for number, worker in workers]

    yield from family("run_seconds", "gauge", "Time that the run has lasted.", ("", clock))
    yield from family("run_over", "gauge", "1 when the run is over.", ("", float(status.over)))
    yield from family("gradients_total", "counter", "Gradients that have taken effect.", ("", float(view.gradients)))
    yield from family("gradients_per_second", "gauge", "Rate of all workers, of late.", ("", float(view.rate(clock))))
    yield from family("loss", "gauge", "Mean of the last minibatch losses of all workers.", ("", view.loss))
    yield from family("workers_alive", "gauge", "Workers that are in the run.", ("", float(len(view.alive))))
    yield from family("worker_up", "gauge", "1 while the worker is in the run.", *each(lambda w: w.alive))
    yield from family("worker_gradients_total", "counter", "Gradients of the worker.", *each(lambda w: w.gradients))
    yield from family("worker_gradients_per_second", "gauge", "Rate, of late.", *each(lambda w: w.rate(clock)))
    yield from family("worker_loss", "gauge", "Mean of its last minibatch losses.", *each(lambda w: w.loss))
    about = "Updates of the master between what the worker read and its last gradient."
    yield from family("worker_lag", "gauge", about, *each(lambda w: w.lag))
    about = "RMSE between the master's point and where the last gradient was taken."
    yield from family("worker_gap", "gauge", about, *each(lambda w: w.gap))
    about = "Times that the worker joined again."
    yield from family("worker_restarts_total", "counter", about, *each(lambda w: max(0, w.joined - 1)))
    yield from family("worker_crashes_total", "counter", "Times that it was lost.", *each(lambda w: w.crashed))
    about = "Bytes that the worker has sent in messages of the method."
    yield from family("worker_sent_bytes_total", "counter", about, *each(lambda w: w.sent))
    last = view.evaluations[-1][2] if view.evaluations else {}
    labelled = [(f'{{figure="{_escaped(name)}"}}', value) for name, value in sorted(last.items())]
    yield from family("evaluation", "gauge", "Figures of the model that would be shipped, of late.", *labelled)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
