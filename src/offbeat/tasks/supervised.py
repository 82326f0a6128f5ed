"""Supervised problems: a module, a loss and a data set, seen as a function of one flat vector."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..core.seeds import derive
from ..core.values import refuse, require
from .data import Where
from .flat import Flat

Pair: TypeAlias = tuple[Tensor, Tensor]
Dtype: TypeAlias = Literal["float32", "float64"]

CHUNK = 1000
"""Examples per forward pass of an evaluation, where the problem does not say."""
STATISTICS = 20
"""Training batches from which an evaluation recomputes the statistics of batch normalisation."""
HELD = 2 << 30
"""Bytes up to which a data set is kept in memory as tensors."""

# What a seed is for: the first part of every derived seed, so that no two uses share random numbers.
_INIT, _ORDER, _DRAW, _AUGMENT, _EVALUATE, _SAMPLE = range(6)

# Torch's default generators belong to the whole process, and a module is written to while it is used.
_ALONE = threading.RLock()


@dataclass(frozen=True, eq=False)
class Supervised:
    """A problem made of any ``torch.nn.Module``, a loss and a data set.

        problem = Supervised(
            model=lambda: nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)),
            loss=nn.functional.cross_entropy,
            train=(inputs, labels),
            test=(test_inputs, test_labels),
        )

    Everything is a pure function of the seed and of who asks when. Initial weights depend on ``seed``. Each worker goes
    through its own permutation of the training set in each pass, so that within a pass it sees no example twice; what
    is left over at the end of a pass, less than a batch, is dropped. Dropout and augmentation depend on ``(seed,
    worker, step)``. The caller's random state is never changed. Random numbers must come from torch (not from
    ``random`` or numpy). The same bits come back on the same machine, torch version and number of threads.

    The flat vector holds the trainable parameters (see `Flat`); buffers are no part of it. Every gradient starts from
    the buffers that the module was built with, so nothing that a forward pass leaves in them reaches another call.
    Batch normalisation: gradients use the statistics of their minibatch only. An evaluation first recomputes the
    running statistics at the evaluated point, as the plain average over a fixed sample of 20 training batches (fewer if
    the set is smaller), without dropout or augmentation, and then uses these.

    One call at a time per process: concurrent calls wait for each other. A problem pickles if its parts do (a lambda
    does not); what it builds on first use is not pickled. For a GPU, ``model`` draws the weights on the CPU and moves
    them; the data follows. Raises ``ValueError`` for bad fields.
    """

    model: Callable[[], nn.Module]
    """Builds the module, a new one at every call: a function, not a module."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """``loss(outputs, targets) -> Tensor[]``, a mean over the examples, as in ``torch.nn.functional.cross_entropy``."""
    train: tuple[Any, Any] | Dataset[Any] = field(repr=False)
    """``(inputs, targets)``, two tensors or arrays with one row per example, or a map-style ``Dataset`` of such pairs.

    A data set is read once into tensors, if it takes up to 2 GiB and its items draw no random numbers; else items are
    read by index for each minibatch. Floating-point values are cast to ``dtype``, integers stay as they are."""
    test: tuple[Any, Any] | Dataset[Any] = field(repr=False)
    """What `evaluate` measures on, given like ``train``."""
    batch: int = 32
    """Examples per minibatch, from 1 to the size of the training set."""
    seed: int = 0
    """Any integer: initial weights, order of examples, dropout and augmentation follow from it."""
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None
    """Further figures of `evaluate`: name -> ``metric(outputs, targets) -> Tensor[]``, a mean over the examples.

    None: the accuracy, if the targets are one integer label per example and the outputs one score per class."""
    augment: Callable[[Tensor, Generator], Tensor] | None = None
    """``augment(inputs, generator) -> inputs``, applied to each training minibatch; may change ``inputs`` in place."""
    dtype: torch.dtype = torch.float32
    """Floating-point type of the parameters and of the data."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """For each file of the data: ``"official"``, or how it differs (see `offbeat.tasks.data`)."""
    finish: Callable[[nn.Module, dict[str, float]], dict[str, float]] | None = None
    """``finish(module, means) -> figures``: what `evaluate` returns, made of the means over the test set and of the
    module in evaluation mode at ``x``. For figures that are no mean over examples, such as perplexity or BLEU.
    Called without gradients. None: the means themselves."""
    chunk: int | None = None
    """Examples per forward pass of an evaluation, at least 1; None: 1,000. Take fewer where they need much memory."""

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            refuse(self, "model", type(self.model).__name__, "give a function that builds it, e.g. lambda: Net()")
        for name in ("model", "loss"):
            require(self, name, callable(getattr(self, name)), "give a function")
        floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        require(self, "dtype", floating, "choose a floating-point type, e.g. torch.float32")
        if "loss" in (self.metrics or {}):
            refuse(self, "metrics", list(self.metrics or {}), "'loss' is always there: choose another name")
        size = self._size("train")
        self._size("test")
        fits = isinstance(self.batch, int) and 1 <= self.batch <= size
        require(self, "batch", fits, f"choose 1 to {size}, the size of the training set")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "finish", self.finish is None or callable(self.finish), "give a function or None")
        whole = self.chunk is None or (isinstance(self.chunk, int) and self.chunk >= 1)
        require(self, "chunk", whole, "choose 1 or more, or None")

    def x0(self) -> Tensor:
        """The initial parameters, ``Tensor[d]`` of type ``dtype``: a new tensor, the same values at every call."""
        return self._live.start.clone()

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The gradient ``Tensor[d]`` and the loss ``Tensor[]`` of this worker's ``step``-th minibatch at ``x``.

        ``x`` is ``Tensor[d]`` and is not changed; both results are new and detached. ``step`` counts from 0.
        """
        live = self._live
        with _ALONE, _Seeded(live.generators, derive(_DRAW, self.seed, worker, step)), torch.enable_grad():
            live.load(x)
            live.flat.grad.zero_()
            inputs, targets = live.minibatch(worker, step)
            loss = self.loss(live.module(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return live.flat.gather().clone(), loss.detach()

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``{"loss": ..., "accuracy": ...}`` (or your ``metrics``) at ``x``: means over the whole test set.

        With ``finish``, what that makes of them.
        """
        live = self._live
        with _ALONE, _Seeded(live.generators, derive(_EVALUATE, self.seed)), torch.no_grad():
            live.load(x)
            live.module.eval()
            try:
                live.measure_statistics()
                means = self._measure(live)
                return means if self.finish is None else self.finish(live.module, means)
            finally:
                live.module.train()

    def minibatch(self, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """``(inputs, targets)``, each ``Tensor[batch, ...]``, as ``grad(x, worker, step)`` sees them."""
        live = self._live
        with _ALONE, _Seeded(live.generators, derive(_DRAW, self.seed, worker, step)):
            return live.minibatch(worker, step)

    @cached_property
    def _live(self) -> _Live:
        with _ALONE:
            return _Live(self)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _measure(self, live: _Live) -> dict[str, float]:
        sums: dict[str, float] = {}
        size, chunk = len(live.test), self.chunk or CHUNK
        for start in range(0, size, chunk):
            index = torch.arange(start, min(start + chunk, size), dtype=torch.int32, device=live.start.device)
            inputs, targets = live.test.take(index)
            outputs = live.module(inputs)
            metrics = self.metrics if self.metrics is not None else _usual(outputs, targets)
            for name, figure in {"loss": self.loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(figure(outputs, targets)) * len(index)
        return {name: total / size for name, total in sums.items()}

    def _size(self, name: str) -> int:
        data = getattr(self, name)
        if isinstance(data, tuple | list):
            if len(data) != 2 or len(data[0]) != len(data[1]):
                refuse(self, name, [len(d) for d in data], "give (inputs, targets) with as many targets as inputs")
            size = len(data[0])
        elif isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            refuse(self, name, data, "give (inputs, targets) or a Dataset with __len__ and __getitem__")
        else:
            size = len(data)
        if not size:
            refuse(self, name, "empty", "give at least one example")
        return size


class _Live:
    """What a problem builds on first use, once per process: the module, its vector, the data, the orders in use."""

    def __init__(self, problem: Supervised) -> None:
        self.problem = problem
        with _Seeded((torch.default_generator,), derive(_INIT, problem.seed)):
            self.module = problem.model().to(problem.dtype)
            self.module.train()
            self.flat = Flat(self.module)
            device = self.flat.data.device
            self.train = _examples(problem, "train", device)
            self.test = _examples(problem, "test", device)
        self.start = self.flat.data.clone()
        self.generators = _generators(device)
        self.own = Generator(device)
        # Those that the module itself keeps in evaluation mode (frozen statistics) are not ours to recompute.
        modules = self.module.modules()
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats and m.training]
        modules = self.module.modules()
        self.buffers = [(m, n, b, b.clone()) for m in modules for n, b in m.named_buffers(recurse=False)]
        self.orders: dict[int, tuple[int, tuple[Tensor, ...]]] = {}

    def load(self, x: Tensor) -> None:
        """Put the module at ``x``, with the buffers it was built with."""
        self.flat.data.copy_(x.detach() if x.requires_grad else x)
        for module, name, buffer, built in self.buffers:
            setattr(module, name, buffer)  # a forward pass may have put another tensor in its place
            buffer.copy_(built)

    def minibatch(self, worker: int, step: int) -> Pair:
        problem = self.problem
        turn, place = divmod(step, len(self.train) // problem.batch)
        held, batches = self.orders.get(worker, (-1, ()))
        if held != turn:
            batches = self.order(_ORDER, problem.seed, worker, turn)
            self.orders[worker] = turn, batches
        inputs, targets = self.train.take(batches[place])
        if problem.augment is not None:
            self.own.manual_seed(derive(_AUGMENT, problem.seed, worker, step))
            inputs = problem.augment(inputs, self.own)
        return inputs, targets

    def order(self, *seed: int) -> tuple[Tensor, ...]:
        """A permutation of the training set, cut into minibatches; drawn on the CPU, so that a GPU sees the same."""
        generator = Generator().manual_seed(derive(*seed))
        order = torch.randperm(len(self.train), generator=generator, dtype=torch.int32)
        return torch.split(order.to(self.start.device), self.problem.batch)

    def measure_statistics(self) -> None:
        """Recompute the running statistics of batch normalisation, in a module that is in evaluation mode."""
        if not self.norms:
            return
        batches = self.order(_SAMPLE, self.problem.seed)
        for k in range(min(STATISTICS, len(self.train) // self.problem.batch)):
            for norm in self.norms:
                norm.train()
                norm.momentum = 1 / (k + 1)  # the plain average; None would mean that too, but not to InstanceNorm
            self.module(self.train.take(batches[k])[0])
        self.module.eval()


class _Tensors:
    """Examples held as two tensors."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Pair:
        return self.inputs.index_select(0, index), self.targets.index_select(0, index)


class _Items:
    """Examples read from a data set when they are asked for."""

    def __init__(self, dataset: Any, cast: Callable[[Any], Tensor]) -> None:
        self.dataset, self.cast = dataset, cast

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: Tensor) -> Pair:
        inputs, targets = default_collate([self.dataset[i] for i in index.tolist()])
        return self.cast(inputs), self.cast(targets)


def _examples(problem: Supervised, name: str, device: torch.device) -> _Tensors | _Items:
    def cast(values: Any) -> Tensor:
        t = torch.as_tensor(values).detach()
        return t.to(device, problem.dtype if t.is_floating_point() else None)

    data = getattr(problem, name)
    if isinstance(data, tuple | list):
        return _Tensors(cast(data[0]), cast(data[1]))
    before = torch.get_rng_state()
    first = data[0]
    random = not torch.equal(before, torch.get_rng_state())  # held, such an item would never change again
    if not (isinstance(first, tuple | list) and len(first) == 2):
        refuse(problem, name, data, f"its items must be (input, target) pairs, item 0 is a {type(first).__name__}")
    if random or len(data) * sum(torch.as_tensor(t).nbytes for t in first) > HELD:
        return _Items(data, cast)
    inputs, targets = default_collate([data[i] for i in range(len(data))])
    return _Tensors(cast(inputs), cast(targets))


def _usual(outputs: Tensor, targets: Tensor) -> Mapping[str, Callable[[Tensor, Tensor], Tensor]]:
    """The accuracy, where outputs and targets are those of a classifier."""
    labels = targets.dim() == 1 and not (targets.is_floating_point() or targets.is_complex())
    return {"accuracy": accuracy} if labels and outputs.dim() == 2 and outputs.shape[1] > 1 else {}


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of examples whose highest score (``outputs: Tensor[n, classes]``) is that of their label."""
    return (outputs.argmax(1) == targets).double().mean()


def _generators(device: torch.device) -> tuple[Generator, ...]:
    """Every default generator that a module on this device may draw from."""
    if device.type == "cpu":
        return (torch.default_generator,)
    if device.type == "cuda":
        return (torch.default_generator, torch.cuda.default_generators[device.index])
    raise ValueError(f"a model on {device}: gradients are repeatable on cpu and cuda only, move it there")


class _Seeded:
    """Inside, the generators start from ``seed``; afterwards they are as they were.

    Always done, for it takes microseconds, and whether a module draws (``functional.dropout``) cannot be known for
    certain. ``torch.manual_seed`` would take a hundred: it visits every device.
    """

    def __init__(self, generators: tuple[Generator, ...], seed: int) -> None:
        self.generators, self.seed = generators, seed

    def __enter__(self) -> None:
        self.states = [g.get_state() for g in self.generators]
        for g in self.generators:
            g.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        for g, state in zip(self.generators, self.states, strict=True):
            g.set_state(state)


class Recipe(ABC):
    """A problem named by a few plain values, from which `build` makes a `Supervised` on first use, once per process.

    Subclasses are frozen dataclasses: cheap to print, compare and pickle.
    """

    @classmethod
    def data(cls) -> Where | None:
        """Where its files were looked for and which are there, without reading them; None if it needs no files.

        Looks into the data folder as it is now (see `offbeat.tasks.data`).
        """
        return None

    @abstractmethod
    def build(self) -> Supervised:
        """The problem itself, with model and data."""

    @cached_property
    def problem(self) -> Supervised:
        """What `build` gave."""
        return self.build()

    def x0(self) -> Tensor:
        """The initial parameters, ``Tensor[d]``."""
        return self.problem.x0()

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The gradient ``Tensor[d]`` and the loss ``Tensor[]`` of this worker's ``step``-th minibatch at ``x``."""
        return self.problem.grad(x, worker, step)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Figures at ``x`` over the test set, ``"loss"`` and others; which, says the task."""
        return self.problem.evaluate(x)

    @property
    def provenance(self) -> Mapping[str, str]:
        """For each file of the data: ``"official"``, or how it differs."""
        return self.problem.provenance

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "problem"}
