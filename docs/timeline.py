"""The picture on a method's page: when each of four uneven workers computes and waits, and how stale its gradients are."""

from __future__ import annotations

from html import escape
from typing import Any

import offbeat as ob

WORKERS, SECONDS = 4, 16.0
WIDTH, ROW, LEFT, TOP = 720, 30, 84, 8
SHADES = ("#2a9d8f", "#7fb069", "#e9c46a", "#f4a261", "#e76f51")
"""Of a gradient with lag 0, 1, 2, 3, and 4 or more."""


def timeline(cls: type[Any]) -> str:
    """An SVG of a simulated run; empty for a method that cannot be made without arguments."""
    try:
        method = cls()
    except TypeError:
        return ""
    cluster = ob.Cluster(
        workers=WORKERS,
        speed=ob.Gamma(mean=1.0, cv=0.15),
        network=ob.Network(latency=0.05, bandwidth=1e9),
        faults=(ob.Straggler(WORKERS - 1, factor=3.0),),
    )
    trace = ob.simulate(method, ob.tasks.Quadratic(), cluster, gradients=80).trace
    counts = issubclass(cls, ob.ServerMethod)
    return draw([event for event in trace if event.seconds <= SECONDS + 4], counts)


def draw(events: list[ob.Event], lag: bool) -> str:
    height = TOP + ROW * WORKERS + 34
    scale = (WIDTH - LEFT - 16) / SECONDS
    parts = [f'<svg class="timeline" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(CAPTION)}">']
    for worker in range(WORKERS):
        y = TOP + ROW * worker
        slow = " (slow)" if worker == WORKERS - 1 else ""
        parts.append(f'<text x="0" y="{y + 17}">worker {worker}{slow}</text>')
    for event in events:
        y, end = TOP + ROW * event.worker, event.seconds
        begin = end - event.compute - (event.transit if lag else 0)
        shade = SHADES[min(event.lag, len(SHADES) - 1)] if lag else SHADES[0]
        for name, start, stop, fill in (("wait", begin - event.waited, begin, ""), ("", begin, end, shade)):
            start, stop = max(0.0, start), min(SECONDS, stop)
            if stop - start > 0.02:
                look = f'class="{name}"' if name else f'fill="{fill}"'
                parts.append(
                    f'<rect {look} x="{LEFT + scale * start:.1f}" y="{y + 4}" width="{scale * (stop - start) - 1:.1f}" '
                    f'height="{ROW - 10}" rx="2"><title>{_words(event, lag)}</title></rect>'
                )
    y = TOP + ROW * WORKERS
    for second in range(0, int(SECONDS) + 1, 4):
        x = LEFT + scale * second
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y}" stroke-dasharray="2 3"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 13}" text-anchor="middle">{second} s</text>')
    if lag:
        parts.append(f'<text x="{LEFT + 20}" y="{y + 30}">updates by others meanwhile:</text>')
        for count, shade in enumerate(SHADES):
            x = LEFT + 190 + 46 * count
            parts.append(f'<rect fill="{shade}" x="{x}" y="{y + 20}" width="12" height="12" rx="2"/>')
            parts.append(f'<text x="{x + 16}" y="{y + 30}">{count}{"+" if count == len(SHADES) - 1 else ""}</text>')
    x = LEFT + (450 if lag else 20)
    parts.append(f'<rect class="wait" x="{x}" y="{y + 20}" width="12" height="12" rx="2"/>')
    parts.append(f'<text x="{x + 16}" y="{y + 30}">waits</text>')
    parts.append("</svg>")
    return "".join(parts) + f"\n\n{CAPTION}"


CAPTION = (
    "A simulated run with four workers, the last of which is three times slower. Each box is a gradient, from its beginning to the "
    "moment it takes effect."
)


def _words(event: ob.Event, lag: bool) -> str:
    return f"worker {event.worker}, gradient {event.step}" + (f", lag {event.lag}" if lag else "")
