"""Experiments: methods against numbers of workers and seeds, on one task, with the same number of gradients for all.

grid = Grid(("asgd", "dana-zero", GapAware(momentum=0.8)), Digits(), workers=(1, 8, 32))
comparison = compare(grid, jobs=2)
comparison.write("runs/first")
"""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import pickle
import re
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, groupby, islice, product
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from . import formats
from .core.descent import Rule
from .core.method import Method
from .core.problem import Batched, Point, Problem
from .core.schedule import Rate, Warmup
from .core.values import refuse, require, require_count
from .cpus import cpus
from .engines.cluster import Cluster
from .engines.faults import Fault
from .engines.lanes import AUTO, Count, check_lanes, measured
from .engines.network import Network
from .engines.replay import replay
from .engines.simulator import Run, Simulation, simulate, together
from .engines.speed import Gamma, Speed
from .failure import Failure
from .methods import find
from .names import names, read
from .plain import dumps, numbers
from .tasks import Digits
from .trace import Event, Trace

NEEDED = (
    "task",
    "methods",
    "workers",
    "seeds",
    "gradients",
    "warmup",
    "speed",
    "network",
    "faults",
    "alone",
    "parameters",
)
"""What the header of a comparison says at least."""


class Key(NamedTuple):
    """Which cell of a grid."""

    label: str
    workers: int
    seed: int

    def __str__(self) -> str:
        return f"{self.label}, {self.workers} worker{'s' if self.workers > 1 else ''}, seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """What the run of one cell came to."""

    key: Key
    figures: dict[str, float]
    """`Run.summary`; empty where the run failed."""
    failure: str
    """The name of the `Failure` that ended it; empty if none did."""
    message: str
    """What the failure said."""
    trace: Trace
    """All events, of a failed run those until then."""


class CellFailed(RuntimeError):
    """A cell ended by something that is no `Failure` of the method: its process died, or there is an error in the code."""


def warmed(method: Method, warmup: float, gradients: int, workers: int) -> Method:
    """``method`` with its ``lr`` rising in a straight line over the first ``warmup`` (0 to 1) of the run's steps."""
    rise = Warmup(max(1, round(warmup * method.horizon(gradients, workers))))
    return _changed(method, "lr", lambda lr: lr * rise) if warmup else method


def _changed(value: Any, name: str, change: Callable[[Any], Any], fixed: Collection[str] = ()) -> Any:
    """``value`` with its field ``name`` changed, or that of the rules and methods it is made of; none in ``fixed``."""
    free = [f.name for f in fields(value) if f.name not in fixed]
    if name in free:
        return replace(value, **{name: change(getattr(value, name))})
    parts = {part: getattr(value, part) for part in free if isinstance(getattr(value, part), Rule | Method)}
    return replace(value, **{part: _changed(inner, name, change) for part, inner in parts.items()})


def _shared(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda old: old if name == "momentum" and not old else value


@dataclass(frozen=True)
class Grid:
    """Every method with every number of workers and every seed: one cell each, all with the same number of gradients.

    ``lr``, ``momentum`` and ``weight_decay`` are for every method that has such a field, or whose rule or inner method
    has; except where its entry says otherwise: a text by naming the field, a value by differing from its class's default.
    """

    methods: tuple[str | Method | tuple[str, Method], ...] = (
        "asgd",
        "nag-asgd",
        "multi-asgd",
        "dana-zero",
        "dana-slim",
        "dana-ga",
        "gap-aware",
        "staleness-aware",
        "gem",
    )
    """Methods by name (``offbeat methods`` lists them), with settings of their own if wanted: ``"gem(kappa=2)"``; from
    Python also as values, or as pairs of a label and a value."""
    task: Problem = Digits()
    """What is trained: a dataclass with a field ``seed``."""
    workers: tuple[int, ...] = (1, 8, 32)
    """Numbers of workers, each at least 1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each drives the task and the cluster of its cells."""
    gradients: int = 4000
    """Minibatch gradients of each cell, all workers together."""
    lr: Rate | None = 0.05
    """Learning rate of every method, a number or a schedule; None: each method's own."""
    momentum: float | None = 0.9
    """Momentum of every method that has any (plain ASGD stays plain); None: each method's own."""
    weight_decay: float | None = None
    """Weight decay of every method; None: each method's own."""
    warmup: float = 0.05
    """Part of a run over which the learning rate rises to its full value, 0 to 1."""
    evaluations: int = 20
    """How often a run evaluates the model that would be shipped, evenly over its gradients; at least 1."""
    speed: Speed = Gamma()
    """Seconds per gradient."""
    network: Network = Network()
    """What messages cost; nothing unless told."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong on the cluster."""

    def __post_init__(self) -> None:
        for name in ("methods", "workers", "seeds"):
            values = getattr(self, name)
            require(self, name, len(values) > 0, "give at least one")
            require(self, name, len(set(values)) == len(values), "one of them is there twice: leave it out")
        for workers in self.workers:
            self.cluster(workers)
        require(self, "seeds", all(isinstance(seed, int) for seed in self.seeds), "must be integers")
        require(self, "gradients", isinstance(self.gradients, int) and self.gradients >= 1, "must be at least 1")
        require_count(self, "evaluations")
        require(self, "warmup", 0 <= self.warmup <= 1, "must be in [0, 1]")
        seeded = "seed" in getattr(self.task, "__dataclass_fields__", ())
        require(self, "task", seeded, "must be a dataclass with a field `seed`")
        stems = [_stem(label) for label in self.lineup]
        require(self, "methods", len(set(stems)) == len(stems), "two of them are too much alike to tell apart")

    @cached_property
    def lineup(self) -> dict[str, Method]:
        """The methods as they run, before the warm-up, by label: the name and what the entry itself says."""
        shared = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        methods: dict[str, Method] = {}
        for entry in self.methods:
            label, cls, said = _entry(entry)
            if label in methods:
                refuse(self, "methods", label, "it is there twice: leave one out")
            method = cls(**said)
            for name, value in shared.items():
                if value is not None and name not in said:
                    method = _changed(method, name, _shared(name, value), fixed=said)
            methods[label] = method
        return methods

    @property
    def keys(self) -> list[Key]:
        """All cells, in order."""
        return [Key(*key) for key in product(self.lineup, self.workers, self.seeds)]

    def cluster(self, workers: int) -> Cluster:
        """What runs the cells with this many workers."""
        return Cluster(workers, self.speed, network=self.network, faults=self.faults)

    def prepare(self, key: Key, lanes: int = 1) -> Simulation:
        """The run of a cell, about to start; cells share their data."""
        method = warmed(self.lineup[key.label], self.warmup, self.gradients, key.workers)
        task = self._task(key.seed)
        every = max(1, self.gradients // self.evaluations)
        return Simulation(method, task, self.cluster(key.workers), self.gradients, key.seed, every, lanes)

    def _task(self, seed: int) -> Problem:
        """The task with this seed."""
        if isinstance(self.task, Batched):
            return self.task.reseeded(seed)
        return cast(Problem, replace(cast(Any, self.task), seed=seed))

    def lanes(self, lanes: Count) -> dict[int, int]:
        """How many gradients at most the runs with each number of workers take in one call."""
        if lanes != AUTO:
            return dict.fromkeys(self.workers, lanes)
        task = self._task(self.seeds[0])
        x, gradients = task.x0(), len(self.keys) // len(self.workers) * self.gradients
        with _threads(1):
            return {n: measured(task, [Point(task, x, k, 0) for k in range(n)], gradients)[0] for n in self.workers}

    def batches(self, lanes: dict[int, int]) -> list[list[Key]]:
        """The cells in the order in which they are run, those together that take their gradients together."""
        several = [key for key in self.keys if lanes[key.workers] > 1]
        alike = groupby(several, key=lambda key: (key.label, key.workers))
        return [list(keys) for _, keys in alike] + [[key] for key in self.keys if lanes[key.workers] == 1]

    def header(self) -> dict[str, Any]:
        """What a `Comparison` says about the grid it is of.

        Prepares each run once, so that whatever is wrong with task, data or settings is raised here, before any work.
        """
        with _threads(1):  # as in the cells: initial weights may depend on their number
            for key in self.keys:
                if key.seed == self.seeds[0]:
                    about = self.prepare(key).trace.header
        alone = {str(s): self.gradients / sum(islice(self.speed.stream(s, 0), self.gradients)) for s in self.seeds}
        return {
            "task": repr(self.task),
            "methods": {label: repr(method) for label, method in self.lineup.items()},
            "workers": list(self.workers),
            "seeds": list(self.seeds),
            "gradients": self.gradients,
            "warmup": self.warmup,
            "speed": repr(self.speed),
            "network": repr(self.network),
            "faults": repr(self.faults),
            "alone": alone,  # gradients per second of one worker that waits for nobody, by seed
            "parameters": about["parameters"],
            "provenance": about["provenance"],
            "versions": about["versions"],
        }


def entry(text: str) -> Method:
    """The method that ``text`` names, with settings of its own if wanted: ``"gem(kappa=2)"``; ``ValueError`` else."""
    _, cls, said = _entry(text)
    return cls(**said)


def _entry(entry: str | Method | tuple[str, Method]) -> tuple[str, type[Method], dict[str, Any]]:
    """The label and the class of a grid's entry, and the fields that the entry itself sets."""
    if isinstance(entry, tuple):
        label, value = entry
        return label, *_entry(value)[1:]
    if isinstance(entry, Method):
        cls = type(entry)
        said = {f.name: getattr(entry, f.name) for f in fields(entry) if getattr(entry, f.name) != f.default}
        own = ", ".join(f"{name}={value!r}" for name, value in said.items())
        return f"{cls.name}({own})" if own else cls.name, cls, said
    name, bracket, rest = entry.strip().partition("(")
    cls = find(name.strip())

    def settings(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(inspect.signature(cls).bind_partial(*args, **kwargs).arguments)

    said = read(f"{cls.__name__}({rest}", {**names(), cls.__name__: settings}) if bracket else {}
    return cls.name + bracket + rest, cls, said


def compare(
    grid: Grid, *, jobs: int | None = None, lanes: Count = 1, watch: Callable[[Cell], None] | None = None
) -> Comparison:
    """Run every cell of ``grid`` in ``jobs`` processes (None: one for each CPU that this one may use); the result does not depend on ``jobs``.

    The same arguments give the same bits, as with `simulate`. ``lanes`` is how many gradients are taken in one call, those of
    all seeds of a cell together; ``"auto"``: what is measured to be faster, once for each number of workers. The headers of
    the traces have what was taken.
    A cell that fails by a `Failure` is part of the result. ``watch`` is called with each cell as it is done.
    Raises ``ValueError`` for bad settings, what the task raises about its data, and `CellFailed` when a process dies.
    """
    jobs = cpus() if jobs is None else jobs
    if not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs = {jobs!r}: must be at least 1, or None for one for each CPU that may be used")
    check_lanes(lanes)
    header, taken, done = grid.header(), grid.lanes(lanes), dict[Key, Cell]()
    with closing(_here(grid, taken) if jobs == 1 else _there(grid, taken, jobs)) as batches:
        for cell in chain.from_iterable(batches):
            done[cell.key] = cell
            if watch:
                watch(cell)
    return Comparison(header, [done[key] for key in grid.keys])


def _cells(grid: Grid, lanes: dict[int, int], keys: list[Key]) -> list[Cell]:
    """Cells that differ in their seeds only, run side by side."""
    runs = [grid.prepare(key, lanes[key.workers]) for key in keys]
    return [_cell(key, run) for key, run in zip(keys, together(runs), strict=True)]


def _cell(key: Key, run: Run | Failure) -> Cell:
    if isinstance(run, Failure):
        return Cell(key, {}, type(run).__name__, str(run), run.trace)
    return Cell(key, run.summary(), "", "", run.trace)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Inside, torch uses ``number`` threads, on which the last bits of a sum depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _here(grid: Grid, lanes: dict[int, int]) -> Generator[list[Cell]]:
    """The cells one batch after the other, with one thread as in the processes of `_there`."""
    with _threads(1):
        for keys in grid.batches(lanes):
            yield _cells(grid, lanes, keys)


def _there(grid: Grid, lanes: dict[int, int], jobs: int) -> Generator[list[Cell]]:
    """The cells as processes of their own get them done. Each has its own pipe, so that a death has a name."""
    context = multiprocessing.get_context("spawn")
    left = grid.batches(lanes)[::-1]
    links = {}
    busy: dict[Connection, list[Key]] = {}
    try:
        for _ in range(min(jobs, len(left))):
            link, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, grid, lanes), daemon=True)
            with _no_interrupt():
                _start(process)
            links[link] = process
            far.close()
            busy[link] = left.pop()
            link.send(busy[link])
        while busy:
            for link in cast(list[Connection], wait(list(busy))):
                keys = busy.pop(link)
                try:
                    answer = link.recv()
                    if left:
                        busy[link] = left.pop()
                        link.send(busy[link])
                except (EOFError, OSError):
                    links[link].join()
                    status = links[link].exitcode
                    why = "is there memory enough?" if status and status < 0 else "what it said stands above"
                    what = f"its process died with exit code {status}"
                    raise CellFailed(f"the cell {_listed(busy.get(link, keys))} was lost: {what}; {why}") from None
                if isinstance(answer, str):
                    raise CellFailed(f"the cell {_listed(keys)} failed:\n{answer}")
                yield answer
    finally:
        for process in links.values():
            process.terminate()
        for process in links.values():
            process.join()


def _start(process: BaseProcess) -> None:
    """Start ``process``, which is handed the grid. ``ValueError`` for a grid that cannot be handed over."""
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the grid cannot go to another process: {error}. A lambda or a function within a function cannot: define it at "
            "the top of a module (def net(): ...), or run all cells in this process with jobs=1"
        ) from error


def _listed(keys: list[Key]) -> str:
    return " and ".join(map(str, keys))


def _serve(link: Connection, grid: Grid, lanes: dict[int, int]) -> None:
    """What a process does: cells that it is told, until nobody tells it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            keys = link.recv()
        except EOFError:
            return
        try:
            answer: list[Cell] | str = _cells(grid, lanes, keys)
        except Exception:
            answer = traceback.format_exc()
        link.send(answer)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C is not for processes that start: it is for us, who end them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Row(NamedTuple):
    """The cells of one method with one number of workers, over all seeds."""

    label: str
    workers: int
    cells: list[Cell]
    mean: dict[str, float]  # over the seeds that finished; empty if none did
    spread: dict[str, float]  # sample standard deviation over the seeds that finished; empty if fewer than two did

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.failure]


@dataclass(frozen=True)
class Comparison:
    """What a grid came to: its header, and a cell for each run that is done."""

    header: dict[str, Any]
    cells: Sequence[Cell]

    @property
    def figures(self) -> list[str]:
        """The names of the task's own figures, the one that matters most first."""
        found = {name: None for cell in self.cells for e in cell.trace.evaluations for name in e.figures}
        return sorted(found, key=lambda name: (name != "accuracy", name != "loss"))

    def rows(self) -> list[Row]:
        """The cells summed up over seeds, in the order of the grid.

        ``speedup`` is gradients per second, relative to the cell of the same method with one worker where the grid has
        it, else to one worker that waits for nobody.
        """
        done = {cell.key: cell for cell in self.cells}
        rows = []
        for label, workers in product(self.header["methods"], self.header["workers"]):
            cells = [done[key] for s in self.header["seeds"] if (key := Key(label, workers, s)) in done]
            figures = [cell.figures | {"speedup": self._speedup(cell, done)} for cell in cells if not cell.failure]
            columns = {
                name: torch.tensor([f[name] for f in figures], dtype=torch.float64)
                for name in (figures[0] if figures else ())
            }
            mean = {name: float(values.mean()) for name, values in columns.items()}
            several = {name: float(values.std()) for name, values in columns.items() if len(values) > 1}
            spread = {name: value for name, value in several.items() if math.isfinite(value)}
            rows.append(Row(label, workers, cells, mean, spread))
        return [row for row in rows if row.cells]

    def _speedup(self, cell: Cell, done: Mapping[Key, Cell]) -> float:
        one = done.get(cell.key._replace(workers=1))
        alone = one.figures["gradients_per_second"] if one and one.figures else self.header["alone"][str(cell.key.seed)]
        return cell.figures["gradients_per_second"] / float(alone)

    def table(self) -> list[list[str]]:
        """The rows as text, the titles first; a spread follows a plus-minus sign."""
        rows = self.rows()
        columns = [*self.figures, "train_loss", "mean_lag", "mean_gap", "mean_consensus", "seconds", "speedup"]
        columns = [n for n in columns if n not in TITLES or any(row.mean.get(n) for row in rows)]  # what was measured
        lines = [["method", "workers", *(TITLES.get(name, name) for name in columns), "failed"]]
        for row in rows:
            spread = {name: row.spread[name] for name in (*self.figures, "train_loss") if name in row.spread}
            texts = [show(name, row.mean[name], spread.get(name)) if row.mean else "-" for name in columns]
            kinds = " ".join(sorted({cell.failure for cell in row.failed}))
            failed = f"{kinds} {len(row.failed)} of {len(row.cells)}" if row.failed else ""
            lines.append([row.label, str(row.workers), *texts, failed])
        return lines if any(row.failed for row in rows) else [line[:-1] for line in lines]

    def write(self, folder: str | Path) -> None:
        """Write ``comparison.json`` into ``folder``, and the traces into ``traces`` there."""
        folder = Path(folder)
        (folder / "traces").mkdir(parents=True, exist_ok=True)
        cells = []
        for cell in self.cells:
            path = f"traces/{_stem(cell.key.label)}-{cell.key.workers}w-seed{cell.key.seed}.jsonl"
            cell.trace.write(folder / path)
            about = {"figures": cell.figures, "failure": cell.failure, "message": cell.message, "trace": path}
            cells.append(cell.key._asdict() | about)
        text = dumps({"format": formats.COMPARISON, **self.header, "cells": cells}, indent=1)
        (folder / "comparison.json").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Comparison:
        """What `write` has written into ``folder``; ``ValueError`` where it is damaged."""
        path = Path(folder) / "comparison.json"
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if not formats.check(header.pop("format"), formats.COMPARISON, str(path)):
                raise ValueError(f"its format is not {formats.COMPARISON!r}")
            if absent := {*NEEDED} - header.keys():
                raise ValueError(f"its header has no {', '.join(sorted(absent))}")
            cells = []
            for about in header.pop("cells"):
                key = Key(about["label"], about["workers"], about["seed"])
                trace = Trace.read(path.parent / about["trace"])
                cells.append(Cell(key, numbers(about["figures"]), about["failure"], about["message"], trace))
        except formats.OtherVersion:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what `offbeat compare` has written: {error!r}; run it again") from None
        return cls(header, cells)


TITLES = {
    "train_loss": "train loss",
    "mean_lag": "lag",
    "mean_gap": "gap",
    "mean_consensus": "consensus",
    "speedup": "speed-up",
}


def show(name: str, value: float, spread: float | None = None) -> str:
    """A figure as text: an accuracy in per cent, anything else with three digits."""
    if name == "accuracy":
        return f"{100 * value:.1f}{'' if spread is None else f' ± {100 * spread:.1f}'} %"
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value:g}"
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.3g}"
    return text if spread is None else f"{text} ± {spread:.1g}"


def rerun(trace: Trace, problem: Problem | None = None, watch: Callable[[Event], None] | None = None) -> Run:
    """Run again what ``trace`` has recorded: simulate it from its header, or replay the order of a real run.

    The events of a simulated run are the same bit for bit on the same kind of machine with the same torch and number of
    threads (the header's, if it says one), those of a cell of a comparison in lanes to rounding; a real run's final parameters are the same to rounding. ``problem`` takes the
    place of the header's; a real run in a user's own script needs it, as nobody else knows its gradients.
    Raises ``ValueError`` where the header names something that is no value of the library.
    """
    header = trace.header
    engine = header.get("engine")
    if engine not in ("simulator", "runtime"):
        raise ValueError(f"cannot run this trace again: its engine is {engine!r}, not the simulator or the runtime")
    if engine == "runtime" and problem is None and not header.get("problem"):
        raise ValueError(
            "cannot replay this trace: it is of a user's own script, whose gradients only the script knows; name a problem "
            "whose gradients are the same function of (x, worker, step)"
        )
    parts: dict[str, Any] = {"problem": problem}
    for part in ("method", "problem", "cluster") if engine == "simulator" else ("method", "problem"):
        if parts.get(part) is None:
            try:
                parts[part] = read(header[part])
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"cannot run this trace again: its {part} {header.get(part)!r} is no value of the library ({error}); "
                    "call offbeat.simulate with the values that it was made from"
                ) from None
    with _threads(header.get("threads", torch.get_num_threads())):
        if engine == "runtime":
            return replay(trace, parts["method"], parts["problem"], watch)
        settings = {name: header[name] for name in ("gradients", "seed", "evaluate_every")}
        settings |= {name: header.get(name, 1) for name in ("lanes", "abreast")}
        return simulate(parts["method"], parts["problem"], parts["cluster"], **settings, watch=watch)


def _stem(label: str) -> str:
    """What the label is in the name of a file."""
    return re.sub(r"[^\w.=-]+", "_", label).strip("_")[:100]
