"""Which methods suit a recorded cluster: how fast each would be is computed, what a gradient is worth is a rule of thumb."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.values import parse
from ..engines.cluster import Cluster
from ..failure import Failure
from ..names import names
from .fit import Fit
from .model import Prediction, predict

TIE = 0.1
"""Methods whose speeds differ by less are told apart by how stale their gradients are: a prediction is not more precise."""


@dataclass(frozen=True)
class Candidate:
    """A method, and what is known of it beside its speed."""

    name: str
    """On the command line."""
    value: str
    """As its ``repr``."""
    stale: int
    """How far its gradients are from those of one worker with a larger minibatch; 0: not at all. It orders methods alike in speed."""
    held: float
    """The highest mean lag at which it, or what it is made of, has trained in docs/results.md, in updates; infinite where lag means
    nothing for it."""
    rule: str
    """A rule of thumb of how it learns."""


CANDIDATES = (
    Candidate(
        "all-reduce",
        "AllReduce()",
        0,
        math.inf,
        "learns as one worker with a minibatch as large as all of theirs; nothing is stale",
    ),
    Candidate(
        "backup-workers(backups=1)",
        "BackupWorkers(backups=1)",
        1,
        math.inf,
        "nothing is stale; the last gradient of each round is thrown away, so the slowest worker's data counts less",
    ),
    Candidate(
        "local-sgd(period=8)",
        "LocalSGD(period=8)",
        2,
        math.inf,
        "workers drift apart between averages: more with long periods, high rates and data that differ",
    ),
    Candidate(
        "sgp",
        "SGP()",
        2,
        math.inf,
        "models differ a little, as each averages with one peer a step: more with many workers",
    ),
    Candidate(
        "ad-psgd",
        "ADPSGD()",
        3,
        math.inf,
        "models differ, and a gradient meets one that others have moved meanwhile: nobody waits for a slow worker",
    ),
    Candidate(
        "dana-ga",
        "DanaGA()",
        3,
        31,
        "stale gradients are divided by how far the model has moved: they count less, with momentum kept",
    ),
    Candidate("gem", "GEM()", 3, 31, "each worker scales its steps by what others have done meanwhile"),
    Candidate(
        "ssp",
        "SSP()",
        4,
        31,
        "as asgd, but the fastest waits where it is a few gradients ahead, so that lag is bounded",
    ),
    Candidate(
        "dana-zero",
        "DanaZero()",
        4,
        7,
        "momentum looks ahead over the lag; rates must fall where there are many workers",
    ),
    Candidate(
        "asgd",
        "ASGD()",
        5,
        31,
        "stale gradients are taken as they are, so without momentum; rates must fall with the lag",
    ),
)


@dataclass(frozen=True)
class Advice:
    """A method and its place."""

    candidate: Candidate
    prediction: Prediction | None
    """None where it cannot run there."""
    measured: bool
    """Whether the speed is the record's own."""
    why: str
    """What is measured or computed of it."""


def advise(fit: Fit, workers: int, preset: Callable[..., Cluster] | None = None) -> list[Advice]:
    """All candidates for so many ``workers``, the best first.

    Faster is better. Of those that are as fast as the fastest one left but for `TIE`, the least stale comes first. Those whose
    lag would be above what they have been seen to stand come after all others.
    """
    advice = [_judge(fit, candidate, workers, preset) for candidate in CANDIDATES]
    sound = [a for a in advice if a.prediction and a.prediction.lag <= a.candidate.held + 1]
    rest = [a for a in advice if a not in sound]
    fast = max((a.prediction.rate for a in advice if a.prediction), default=1.0)
    return [_said(a, fast) for a in (*_ranked(sound), *_ranked(rest))]


def _judge(fit: Fit, candidate: Candidate, workers: int, preset: Callable[..., Cluster] | None) -> Advice:
    method = parse(candidate.value, names())
    try:
        prediction = predict(fit, candidate.name, method, workers, preset)
    except (Failure, ValueError) as error:
        return Advice(candidate, None, False, f"cannot run there: {error}")
    same = type(method).__name__ == fit.method.partition("(")[0] and workers == fit.workers and preset is None
    return Advice(candidate, prediction, same, "")


def _ranked(advice: list[Advice]) -> list[Advice]:
    left, ranked = list(advice), []
    while left:
        fastest = max(_rate(a) for a in left)
        near = [a for a in left if _rate(a) >= (1 - TIE) * fastest]
        best = min(near, key=lambda a: (a.candidate.stale, -_rate(a)))
        left.remove(best)
        ranked.append(best)
    return ranked


def _rate(advice: Advice) -> float:
    return advice.prediction.rate if advice.prediction else 0.0


def _said(advice: Advice, fastest: float) -> Advice:
    prediction, candidate = advice.prediction, advice.candidate
    if prediction is None:
        return advice
    part = f"{100 * prediction.rate / fastest:.0f} % of the fastest; " if prediction.rate < fastest else "the fastest; "
    why = f"{part}waits {100 * prediction.waiting:.0f} % of its time, limited by {prediction.limit}"
    if math.isfinite(candidate.held):
        why += f"; mean lag {prediction.lag:.0f}"
        if prediction.lag > candidate.held + 1:
            why += f", beyond the {candidate.held:.0f} at which it was seen to learn: it comes last"
    return Advice(candidate, prediction, advice.measured, why)
