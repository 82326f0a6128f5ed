"""Commands that read the record of a run, and say what other runs would do: predict, advise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..core.method import Method
from ..core.values import require, require_count, unknown
from ..engines.cluster import Cluster
from ..engines.presets import PRESETS
from ..failure import Failure
from ..names import read
from ..plain import dumps
from ..predict import KINDS, Fit, Prediction, advise, calibrated, fit, predict
from ..trace import Trace
from .command import Command, told, writable
from .display import command_line, err, out, shown, table
from .flags import ModuleNames, load, method_of

RecordPath = Annotated[Positional[Path], arg(metavar="RUN")]
PlacePreset = Annotated[
    str | None,
    arg(
        metavar="NAME",
        help=f"In place of the recorded cluster, its gradients with a machine for each worker on one of {', '.join(PRESETS)}.",
    ),
]


@dataclass(frozen=True)
class Predict(Command):
    """Say from the record of a run how fast other methods and numbers of workers would be, and what would limit them."""

    record: RecordPath
    """The folder of a run, or its trace; a minute with two workers or more."""
    workers: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of workers."""
    methods: Annotated[
        tuple[str, ...],
        arg(metavar="METHOD [METHOD ...]", help_behavior_hint="(default: the recorded one, and one of each kind)"),
    ] = ()
    """Methods: names, with settings if wanted, such as "local-sgd(period=4)"."""
    preset: PlacePreset = None
    imports: ModuleNames = ()
    """Modules to import, those of classes that the methods are made of."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: the record's)")] = None
    """Where predict.png and predict.json go."""

    def __post_init__(self) -> None:
        require(self, "workers", len(self.workers) > 0, "give at least one number")
        for n in self.workers:
            require(self, "workers", n >= 1, "each must be at least 1")

    def run(self, argv: Sequence[str]) -> int:
        with told():
            load(self.imports)
            place = preset_of(self.preset)
            record = recorded(self.record)
            methods = _methods(record, self.methods)
            folder = writable(self.out or (self.record if self.record.is_dir() else self.record.parent))
            record, here = calibrated(record, _recorded_method(record))
        predictions, failed = [], []
        for name, method in methods.items():
            for n in dict.fromkeys(self.workers):
                try:
                    predictions.append(predict(record, name, method, n, place))
                except (Failure, ValueError) as error:
                    failed.append(f"{name} with {n} workers cannot run there: {error}")
        out.print(_about(record, here), soft_wrap=True)
        out.print(_table(predictions))
        for note in (*record.notes, *failed):
            err.print(f"offbeat: {shown(note)}")
        said = {
            "command": command_line(argv),
            "record": {
                f.name: repr(getattr(record, f.name)) for f in fields(record) if f.name not in ("speed", "notes")
            },
            "notes": list(record.notes),
            "model_at_record": asdict(here),
            "predictions": [asdict(p) for p in predictions],
        }
        (folder / "predict.json").write_text(dumps(said, indent=1) + "\n", encoding="utf-8")
        if predictions:
            _draw(record, predictions, folder)
        return 0


@dataclass(frozen=True)
class Advise(Command):
    """Rank methods for the cluster that the record of a run shows: what is measured, computed and a rule of thumb of each."""

    record: RecordPath
    """The folder of a run, or its trace; a minute with two workers or more."""
    workers: Annotated[int | None, arg(help_behavior_hint="(default: as many as were recorded)")] = None
    """Number of workers."""
    preset: PlacePreset = None
    imports: ModuleNames = ()
    """Modules to import, those of classes that the recorded method is made of."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            require_count(self, "workers")

    def run(self, argv: Sequence[str]) -> int:
        with told():
            load(self.imports)
            place = preset_of(self.preset)
            record = recorded(self.record)
            record, here = calibrated(record, _recorded_method(record))
        out.print(_about(record, here), soft_wrap=True)
        workers = self.workers or record.workers
        where = f" on {self.preset}" if self.preset else ""
        out.print(f"for {workers} workers{where}, the best first:")
        for place_of, advice in enumerate(advise(record, workers, place), start=1):
            rate = record.rate if advice.measured else advice.prediction.rate if advice.prediction else math.nan
            speed = f"{rate:,.1f} gradients/s, " if rate == rate else ""
            source = "measured" if advice.measured else "computed"
            out.print(
                f"{place_of:2}. [bold]{shown(advice.candidate.name)}[/]  {source}: {speed}{shown(advice.why)}. "
                f"Rule of thumb: {shown(advice.candidate.rule)}.",
                soft_wrap=True,
            )
        out.print(
            "Measured is the record's own, computed by the simulator from it. What a gradient is worth is a rule of thumb: try the "
            "first two or three with a rate for each."
        )
        for note in record.notes:
            err.print(f"offbeat: {shown(note)}")
        return 0


def recorded(path: Path) -> Fit:
    """What the record at ``path`` shows: a trace, or the folder of a run, of several servers all."""
    if path.is_dir() and not (path / "trace.jsonl").exists():
        parts = sorted(path.glob("shard-*/trace.jsonl"), key=lambda p: int(p.parent.name.rpartition("-")[2]))
        if not parts:
            raise ValueError(f"{path} holds no trace: give the folder of `offbeat launch` or `offbeat simulate`")
        first, *others = map(Trace.read, parts)
        return fit(first, others)
    return fit(Trace.read(path / "trace.jsonl" if path.is_dir() else path))


def preset_of(name: str | None) -> Callable[..., Cluster] | None:
    if name is not None and name not in PRESETS:
        raise ValueError(unknown("preset", name, list(PRESETS)))
    return PRESETS[name] if name else None


def _recorded_method(record: Fit) -> Method:
    try:
        method = read(record.method)
    except ValueError as error:
        raise ValueError(f"{error}; name the module of a method of your own with --import") from None
    if not isinstance(method, Method):
        raise ValueError(f"the record's method is {record.method[:200]!r}, which is none")
    return method


def _methods(record: Fit, said: Sequence[str]) -> dict[str, Method]:
    """The methods by what they are called: those that are said, or the recorded one and one of each other kind."""
    if said:
        return {text: method_of(text) for text in said}
    own = _recorded_method(record)
    return {type(own).name: own} | {name: method_of(name) for name in KINDS if name != type(own).name}


def _about(record: Fit, here: Prediction) -> str:
    """What the record shows, and how well the model explains it."""
    machines = record.machines
    lines = [
        f"record: {record.method.partition('(')[0]}, {record.workers} workers, {record.seconds:,.0f} s: {record.rate:,.1f} "
        f"gradients/s, {100 * record.waiting:.0f} % of the time between gradients",
        f"model:  {here.rate:,.1f} gradients/s for the same ({100 * (here.rate / record.rate - 1):+.1f} %), "
        f"{100 * here.waiting:.0f} % between gradients; predictions for this cluster are corrected by that",
    ]
    costs = f"a gradient takes {_ms(record.alone)} alone"
    if machines is not None:
        costs += f", an exchange {_ms(machines.handling)} of a worker's processor"
        costs += f" and {_ms(machines.service)} of the server's" if machines.service else ""
        where = "all on one machine" if machines.workers is None else f"{machines.workers} workers on a machine"
        costs += f"; {machines.cores:g} cores, {where}, which threads at work are taken to share fairly"
    if record.known is not None:
        lines.append("check:  the record is simulated, and so its cluster is known: the last column is what that does")
    return "\n".join([*lines, costs])


def _table(predictions: Sequence[Prediction]) -> object:
    known = any(p.known is not None for p in predictions)
    titles = ["method", "workers", "gradients/s", "MB/s", "waiting", "lag", "limited by", *(["known"] if known else [])]
    lines = [
        [
            p.method,
            str(p.workers),
            f"{p.rate:,.1f}",
            f"{p.bytes / 1e6:,.1f}",
            f"{100 * p.waiting:.0f} %",
            f"{p.lag:.1f}",
            p.limit,
            *([f"{p.known:,.1f} ({100 * (p.rate / p.known - 1):+.1f} %)" if p.known else ""] if known else []),
        ]
        for p in predictions
    ]
    return table(titles, lines, right=(1, 2, 3, 4, 5, 7))


def _draw(record: Fit, predictions: Sequence[Prediction], folder: Path) -> None:
    try:
        from ..predict.picture import draw
    except ImportError as error:
        err.print(f"no picture: {shown(error)}")
        return
    out.print(f"picture: {shown(draw(record, predictions, folder))}", soft_wrap=True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
