"""Supervised problems: a module, a loss and a data set, seen as a function of one flat vector."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeAlias, cast

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..core.problem import Point
from ..core.seeds import derive
from ..core.values import refuse, require
from .data import Where
from .draws import LaneDraws, PythonSeeded, Seeded, all_seeded, drawn, generators
from .flat import Flat
from .state import Watch
from .tape import Play, Tapes

Pair: TypeAlias = tuple[Tensor, Tensor]
Dtype: TypeAlias = Literal["float32", "float64"]

CHUNK = 250
"""Examples per forward pass of an evaluation, where the problem does not say."""
STATISTICS = 20
"""Training batches from which an evaluation recomputes the statistics of batch normalisation."""
HELD = 2 << 30
"""Bytes up to which a data set is kept in memory as tensors."""
ROOM = 1 << 30
"""Bytes that gradients taken in one call may need."""
ALIGNED = 64
"""Bytes at a multiple of which the parameters begin that a gradient is taken at."""
IGNORED = -100
"""The target that ``cross_entropy`` leaves out of its mean."""
NOTHING = torch.empty(0, dtype=torch.int32)

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
    worker, step)``, whether their random numbers are torch's, Python's ``random`` or those of ``numpy.random``'s own
    functions. The caller's random state is never changed. The same bits come back on the same machine, torch version and
    number of threads.

    The flat vector holds the trainable parameters (see `Flat`); buffers are no part of it. Every gradient starts from
    the buffers that the module was built with, so nothing that a forward pass leaves in them reaches another call. There is
    one module for all workers. A warning says what a forward pass changes in it: buffers that learn, counters in Python.
    Batch normalisation: gradients use the statistics of their minibatch only. An evaluation first recomputes the
    running statistics at the evaluated point, as the plain average over a fixed sample of 20 training batches (fewer if
    the set is smaller), without dropout or augmentation, and then uses these.

    Gradients of several workers can be taken in one call (`grads`), each with parameters, minibatch, batch statistics and
    random numbers of its own.

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
    """Examples per forward pass of an evaluation, at least 1; None: 250. Take fewer where they need much memory."""

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
        return self._start.clone()

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The gradient ``Tensor[d]`` and the loss ``Tensor[]`` of this worker's ``step``-th minibatch at ``x``.

        ``x`` is ``Tensor[d]`` and is not changed; both results are new and detached. ``step`` counts from 0. After a few calls
        the gradient is played back from a recording (tasks/tape.py), unless the module draws from Python's generators, has
        hooks, or keeps something from call to call; of the last, ``UserWarning``.
        """
        live = self._live
        with _ALONE, torch.enable_grad():
            return live.grad(x, self.seed, worker, step)

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """The gradients ``Tensor[n, d]`` and losses ``Tensor[n]`` at n points in one call: `grad` of each, to rounding.

        The problems of ``points`` are kin of this one. After a few calls with as many points they are played back from a
        recording, as with `grad`. Raises ``RuntimeError`` for a module that does what cannot be done for several at once, such
        as to branch on a value or to draw from Python's generators.
        """
        live = self._live
        with _ALONE, torch.enable_grad(), _without_advice():
            return live.grads(points)

    def kin(self) -> object:
        """What it shares with its kin: problems that are `reseeded` from one another."""
        return self._live

    def room(self, point: Point) -> int:
        """How many gradients like the one at ``point`` fit into a GiB at once, at least 1; takes one to find out."""
        live, held = self._live, dict[int, int]()

        def weigh(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        number = derive(_DRAW, self.seed, point.worker, point.step)
        with _ALONE, torch.enable_grad(), Seeded(live.generators, number), saved_tensors_hooks(weigh, lambda t: t):
            live.once(number, point.x, *live.minibatch(self.seed, point.worker, point.step))
        data = live.flat.data
        return max(1, ROOM // (sum(held.values()) + 4 * data.numel() * data.element_size()))

    def prepare(self, point: Point) -> Callable[[], Pair] | None:
        """What gives `grad` at ``point`` in any thread: a recording of it; None where there is none, or on a GPU."""
        live = self._live
        with _ALONE:
            return live.prepared(point.x, self.seed, point.worker, point.step)

    def reseeded(self, seed: int) -> Self:
        """The same problem with another seed; it shares module and data with this one, where seeds make neither."""
        other = replace(self, seed=seed)
        live, start = self._live, None
        with _ALONE:
            module = _built(other)
            same = live.constant(module)
            start = Flat(module).data
        if same:
            other.__dict__.update(_live=live, _start=start)
        return other

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``{"loss": ..., "accuracy": ...}`` (or your ``metrics``) at ``x``: means over the whole test set.

        With ``finish``, what that makes of them.
        """
        live = self._live
        with _ALONE, all_seeded(live.generators, derive(_EVALUATE, self.seed)), torch.no_grad():
            live.load(x)
            live.module.eval()
            try:
                live.measure_statistics(self.seed)
                means = self._measure(live)
                return means if self.finish is None else self.finish(live.module, means)
            finally:
                live.module.train()

    def minibatch(self, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """``(inputs, targets)``, each ``Tensor[batch, ...]``, as ``grad(x, worker, step)`` sees them."""
        live = self._live
        with _ALONE, Seeded(live.generators, derive(_DRAW, self.seed, worker, step)):
            return live.minibatch(self.seed, worker, step)

    @cached_property
    def _live(self) -> _Live:
        with _ALONE:
            return _Live(self)

    @cached_property
    def _start(self) -> Tensor:
        return self._live.start

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _measure(self, live: _Live) -> dict[str, float]:
        sums: dict[str, float] = {}
        size, chunk = len(live.test), self.chunk or CHUNK
        for start in range(0, size, chunk):
            index = torch.arange(start, min(start + chunk, size), dtype=torch.int32, device=live.device)
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


def _built(problem: Supervised) -> nn.Module:
    """The module with the initial weights of the problem's seed."""
    with all_seeded((torch.default_generator,), derive(_INIT, problem.seed)):
        module = problem.model()
        if found := [f"{name} ({p.dtype})" for name, p in module.named_parameters() if p.is_complex()]:
            cure = (
                "hold each as a real one with a last dimension of 2, and use torch.view_as_complex of it in forward()"
            )
            refuse(problem, "model", f"{type(module).__name__} with complex parameters {', '.join(found)}", cure)
        like = problem.dtype.to_complex()  # what `Module.to` would make real
        module._apply(lambda t: t.to(like if t.is_complex() else problem.dtype if t.is_floating_point() else t.dtype))  # type: ignore[no-untyped-call]
        return module.train()


class _Live:
    """What a problem builds on first use, once per process: the module, its vector, the data, the orders in use."""

    def __init__(self, problem: Supervised) -> None:
        self.problem = problem
        self.module = _built(problem)
        self.flat = Flat(self.module)
        self.start = self.flat.data.clone()
        self.device = self.flat.data.device
        with all_seeded((torch.default_generator,), derive(_INIT, problem.seed)):  # an item may draw
            self.train = _examples(problem, "train", self.device)
            self.test = _examples(problem, "test", self.device)
        self.batches = len(self.train) // problem.batch
        self.still = isinstance(self.train, _Tensors) and problem.augment is None  # a minibatch draws nothing
        self.named = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.flat.parameters]
        self.generators = generators(self.device)
        self.own = Generator(self.device)
        self.draws = isinstance(self.train, _Items)  # whether a gradient draws random numbers, as far as is known
        # Those that the module itself keeps in evaluation mode (frozen statistics) are not ours to recompute.
        modules = self.module.modules()
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats and m.training]
        self.buffers = _buffers(self.module)
        self.built = {name: b.clone() for name, b in self.module.named_buffers()}
        self.orders: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self.watch = Watch(self.module, problem.loss, self.buffers, self.norms, self.generators, self.stop)
        # of a gradient, and of gradients in lanes
        self.tape, self.tapes = Tapes(self.generators, self.watch.outdated), Tapes(changed=self.watch.outdated)

    def constant(self, module: nn.Module) -> bool:
        """Whether ``module`` differs from ours in nothing but its trainable parameters."""
        ours = dict(self.module.named_parameters())
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        return all(torch.equal(p, ours[name]) for name, p in frozen.items()) and all(
            torch.equal(b, self.built[name]) for name, b in module.named_buffers()
        )

    def load(self, x: Tensor) -> None:
        """Put the module at ``x``, with the buffers it was built with."""
        self.flat.data.copy_(x.detach() if x.requires_grad else x)
        for module, name, buffer, built in self.buffers:
            setattr(module, name, buffer)  # a forward pass may have put another tensor in its place
            buffer.copy_(built)

    def minibatch(self, seed: int, worker: int, step: int) -> Pair:
        chosen = self.chosen(seed, worker, step)
        if self.still:
            return self.train.take(chosen)
        with PythonSeeded(derive(_AUGMENT, seed, worker, step)):
            inputs, targets = self.train.take(chosen)
            return self.augmented(inputs, seed, worker, step), targets

    def chosen(self, seed: int, worker: int, step: int) -> Tensor:
        """The examples of a minibatch, by number."""
        batch = self.problem.batch
        turn, place = divmod(step, self.batches)
        held, order = self.orders.get((seed, worker), (-1, NOTHING))
        if held != turn:
            order = self.order(_ORDER, seed, worker, turn)
            self.orders[seed, worker] = turn, order
        return order.narrow(0, place * batch, batch)

    def augmented(self, inputs: Tensor, seed: int, worker: int, step: int) -> Tensor:
        if self.problem.augment is None:
            return inputs
        self.own.manual_seed(derive(_AUGMENT, seed, worker, step))
        return self.problem.augment(inputs, self.own)

    def order(self, *seed: int) -> Tensor:
        """A permutation of the training set; drawn on the CPU, so that a GPU sees the same."""
        generator = Generator().manual_seed(derive(*seed))
        return torch.randperm(len(self.train), generator=generator, dtype=torch.int32).to(self.device)

    def grad(self, x: Tensor, seed: int, worker: int, step: int) -> Pair:
        """What `Supervised.grad` gives."""
        if played := self.prepared(x, seed, worker, step):
            return played()
        number = derive(_DRAW, seed, worker, step)
        with Seeded(self.generators, number):
            inputs = _aligned(x), *self.minibatch(seed, worker, step)
            return cast(Pair, self.tape(partial(self.gradient, number), *inputs, form=partial(self.pure, number)))

    def prepared(self, x: Tensor, seed: int, worker: int, step: int) -> Callable[[], Pair] | None:
        """What `Supervised.prepare` gives: it draws from a stream of its own, from where the minibatch has left torch's."""
        if self.device.type != "cpu" or not self.tape.tapes:
            return None
        number, stream = derive(_DRAW, seed, worker, step), Generator()
        if self.still:
            inputs = _aligned(x), *self.minibatch(seed, worker, step)
            stream.manual_seed(number)
        else:
            with Seeded(self.generators, number):
                inputs = _aligned(x), *self.minibatch(seed, worker, step)
                stream.set_state(torch.get_rng_state())
        play = self.tape.play(*inputs)
        return play and partial(_played, play, stream, inputs)

    def gradient(self, number: int, x: Tensor, inputs: Tensor, targets: Tensor) -> Pair:
        """The gradient at ``x``, ``Tensor[d]``, and the loss, ``Tensor[]``; Python's random numbers are those of ``number``."""
        take = partial(self.once, number, x, inputs, targets)
        return self.watch.over(take) if self.watch.due("alone") else take()

    def once(self, number: int, x: Tensor, inputs: Tensor, targets: Tensor) -> Pair:
        """`gradient`."""
        self.load(x)
        self.module.zero_grad()  # left by a call that failed
        with PythonSeeded(number) as python:
            loss = self.problem.loss(self.module(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        if python.drawn:
            self.stop()  # a recording would have them for ever
        return self.flat.take_gradient(), loss.detach()

    def stop(self) -> None:
        """Play no recordings any more."""
        self.tape.stop()
        self.tapes.stop()

    def pure(self, number: int, x: Tensor, inputs: Tensor, targets: Tensor) -> Pair:
        """`gradient`, but the module's own parameters and buffers are neither read nor written."""
        named = zip(self.named, torch.split(x.detach(), self.sizes), self.flat.parameters, strict=True)
        tensors = {name: part.view(p.shape).requires_grad_() for name, part, p in named}
        buffers = {name: b.clone() for name, b in self.built.items()}
        with PythonSeeded(number):
            loss = self.problem.loss(functional_call(self.module, tensors | buffers, (inputs,)), targets)
            each = torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in each]), loss.detach()

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """What `Supervised.grads` gives: the module's forward pass mapped over lanes, one backward pass for all."""
        whose = [(p.problem.seed, p.worker, p.step) for p in points]  # type: ignore[attr-defined]
        number = derive(_DRAW, *whose[0])
        with Seeded(self.generators, number):
            if self.watch.due("lanes"):
                self.watch.over(partial(self.once, number, points[0].x, *self.minibatch(*whose[0])))
        with Seeded(self.generators, number):
            before = [g.get_state() for g in self.generators]
            draws = LaneDraws(self.generators, [derive(_DRAW, *who) for who in whose]) if self.draws else None
            inputs, targets = self.minibatches(whose, draws)
            x = torch.stack([p.x for p in points]).detach()
            if draws:
                with draws:
                    return self._gradients(number, x, inputs, targets)
            grads, losses = self.tapes(partial(self._gradients, number), x, inputs, targets)
            self.draws = drawn(self.generators, before)
        return self.grads(points) if self.draws else (grads, losses)  # if they drew from one stream, each from its own

    def _gradients(self, number: int, x: Tensor, inputs: Tensor, targets: Tensor) -> Pair:
        """The gradient of each lane at its point, ``Tensor[n, d]`` both, and its loss, ``Tensor[n]``.

        Raises ``RuntimeError`` for a module that draws from Python's generators, which would draw once for all lanes.
        """
        n = len(x)
        parts = [
            part.view(n, *p.shape).requires_grad_()
            for part, p in zip(torch.split(x, self.sizes, 1), self.flat.parameters, strict=True)
        ]
        buffers = {name: b.expand(n, *b.shape).clone() for name, b in self.built.items()}
        with PythonSeeded(number) as python:
            losses = self._losses(dict(zip(self.named, parts, strict=True)) | buffers, inputs, targets)
            each = torch.autograd.grad(losses.sum(), parts, materialize_grads=True)
        if python.drawn:
            raise RuntimeError(
                f"{type(self.module).__name__} draws from Python's random or numpy.random, once for all {n} lanes: take "
                "gradients one at a time (lanes=1), or draw from torch"
            )
        grads = torch.empty_like(x)
        for place, part in zip(torch.split(grads, self.sizes, 1), each, strict=True):
            place.view(part.shape).copy_(part)
        return grads, losses.detach()

    def minibatches(self, whose: Sequence[tuple[int, int, int]], draws: LaneDraws | None) -> Pair:
        """The minibatches of several, stacked."""
        if self.still:
            inputs, targets = self.train.take(torch.cat([self.chosen(*who) for who in whose]))
            size = len(whose), self.problem.batch
            return inputs.view(*size, *inputs.shape[1:]), targets.view(*size, *targets.shape[1:])
        pairs = []
        for lane, who in enumerate(whose):
            with draws.lane(lane) if draws else nullcontext():
                pairs.append(self.minibatch(*who))
        return torch.stack([inputs for inputs, _ in pairs]), torch.stack([targets for _, targets in pairs])

    def _losses(self, tensors: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each lane, ``Tensor[n]``."""

        def outputs(tensors: dict[str, Tensor], inputs: Tensor) -> Any:
            return functional_call(self.module, tensors, (inputs,))

        def loss(tensors: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return self.problem.loss(outputs(tensors, inputs), targets)

        if self.problem.loss is not F.cross_entropy:
            found: Tensor = vmap(loss, randomness="different")(tensors, inputs, targets)
            return found
        # mapped over lanes it would be made of a dozen operations: here the lanes are one long minibatch
        whole = vmap(outputs, randomness="different")(tensors, inputs).flatten(0, 1)
        each = F.cross_entropy(whole, targets.flatten(0, 1), reduction="none").view(len(targets), -1)
        if targets.is_floating_point():
            return each.mean(1)
        return each.sum(1) / (targets != IGNORED).flatten(1).sum(1)

    def measure_statistics(self, seed: int) -> None:
        """Recompute the running statistics of batch normalisation, in a module that is in evaluation mode."""
        if not self.norms:
            return
        batches = torch.split(self.order(_SAMPLE, seed), self.problem.batch)
        for k in range(min(STATISTICS, self.batches)):
            for norm in self.norms:
                norm.train()
                norm.momentum = 1 / (k + 1)  # the plain average; None would mean that too, but not to InstanceNorm
            self.module(self.train.take(batches[k])[0])
        self.module.eval()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, `vmap` does not warn of operations that it takes lane by lane: that costs time, which is measured or wanted.

    Python's filters are left alone, as changing them makes every warning of the user's module appear anew.
    """
    warn = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda on: None)
    warn(False)
    try:
        yield
    finally:
        warn(True)


def _aligned(x: Tensor) -> Tensor:
    """``x``, in memory where products are added up in the same order each time."""
    return x.clone() if x.data_ptr() % ALIGNED else x


def _played(play: Play, stream: Generator, inputs: tuple[Tensor, ...]) -> Pair:
    with torch.no_grad():
        return cast(Pair, play(stream, *inputs))


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """All buffers: whose, their names, and their values now."""
    return [(m, n, b, b.clone()) for m in module.modules() for n, b in m.named_buffers(recurse=False)]


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
    with PythonSeeded(0) as python:
        first = data[0]
    random = python.drawn or not torch.equal(
        before, torch.get_rng_state()
    )  # held, such an item would never change again
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

    def reseeded(self, seed: int) -> Self:
        """The same task with another seed; it shares module and data with this one, where seeds make neither."""
        other = replace(cast(Any, self), seed=seed)
        other.__dict__["problem"] = self.problem.reseeded(seed)
        return cast(Self, other)

    def x0(self) -> Tensor:
        """The initial parameters, ``Tensor[d]``."""
        return self.problem.x0()

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The gradient ``Tensor[d]`` and the loss ``Tensor[]`` of this worker's ``step``-th minibatch at ``x``."""
        return self.problem.grad(x, worker, step)

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """The gradients ``Tensor[n, d]`` and losses ``Tensor[n]`` at points of this task and its kin, in one call."""
        return self.problem.grads([p._replace(problem=p.problem.problem) for p in points])  # type: ignore[attr-defined]

    def prepare(self, point: Point) -> Callable[[], Pair] | None:
        """What gives `grad` at ``point`` in any thread: see `Supervised.prepare`."""
        return self.problem.prepare(point)

    def kin(self) -> object:
        """What it shares with the tasks `reseeded` from it."""
        return self.problem.kin()

    def room(self, point: Point) -> int:
        """How many gradients like the one at ``point`` fit into memory at once."""
        return self.problem.room(point)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Figures at ``x`` over the test set, ``"loss"`` and others; which, says the task."""
        return self.problem.evaluate(x)

    @property
    def provenance(self) -> Mapping[str, str]:
        """For each file of the data: ``"official"``, or how it differs."""
        return self.problem.provenance

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "problem"}
