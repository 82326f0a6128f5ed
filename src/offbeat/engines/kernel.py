"""Handlers at the memory's speed: one pass over the vectors where eager makes a dozen.

A handler is pure and works on each element by itself. So it may be compiled into one loop, or run on blocks of the vectors
that stay in the cache, and its results may be written to memory that earlier ones have had. Nothing is written over what it
reads, so a visit that fails leaves everything as it was. What a handler passes on unchanged is passed on and not copied.
"""

from __future__ import annotations

import math
import mmap
import operator
import shutil
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx

from ..core.method import Message, ServerMethod
from ..core.rates import Dial, rate_of, with_rate
from ..core.server import checked
from ..core.tree import apart, finite, leaves, rebuild, tame
from . import stores

BLOCKS = 1 << 15, 1 << 17, 1 << 19
"""Elements of a block; the second where nothing has been measured."""

LARGE = 8_000_000
"""Parameters from which blocks are faster than eager, whose vectors are then new pages each time. (Measured: even at 2 to 4
million, three times as fast at 11 million, slower below a million.)"""

PAGE = 1 << 20
"""Bytes from which a vector has pages of its own."""

Program = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""From all inputs, and the vectors to write to, to the new scalars."""

ALIGNED = 64
"""Bytes of a line of the cache, a register's size at most."""

_free: defaultdict[int, deque[mmap.mmap]] = defaultdict(lambda: deque(maxlen=4))  # about as many as a visit makes


def vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector ``[size]`` with anything in it.

    Its memory goes to the next one of this size when nothing refers to it any more: no tensor, no view, no message under
    way. So nobody says when a buffer is free, and a visit costs no page faults. On Linux its pages are huge. (On a GPU
    torch's own allocator is of this kind.)
    """
    length = size * dtype.itemsize
    if device.type != "cpu" or length < PAGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(size, dtype=dtype, device=device)
    free = _free[length]
    try:
        memory = free.pop()
    except IndexError:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)  # which the tensor's storage holds, and nobody else
    weakref.finalize(view, free.append, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype)


class Kernel:
    """A pure handler for arguments of one structure, run in one of three ways that give the same to rounding: `eager`,
    `blocked` and `fused`. A call goes the way that `warm` has found the fastest, and is `exact` until then.

    Arguments and results are trees of tensors, each 0-dim or of one length [d]. Results that are no argument are new
    vectors (`vector`) or scalars; the last `sums` of these scalars are sums over elements.

    A call may say where the last of its new vectors are to be written, ``into``: to memory that begins at a multiple of
    `ALIGNED` bytes. A way that makes its own vectors leaves it as it is.
    """

    def __init__(self, handler: Callable[..., Any], *args: Any, sums: int = 0) -> None:
        """``args`` are of the structure, dtypes and device that calls will have, and may be of any length."""
        self.handler, self.sums = handler, sums
        inputs = [t[:2].clone() if t.dim() else t.clone() for t in leaves(args)]  # all distinct
        self.args = rebuild(args, inputs)
        self.result = handler(*self.args)
        known = inputs.copy()
        for t in leaves(self.result):
            if not any(t is other for other in known):
                known.append(t)
        self.new = known[len(inputs) :]
        """What a call makes: the results that are no argument, each once."""
        self.place = [next(k for k, other in enumerate(known) if t is other) for t in leaves(self.result)]
        self.size = 0
        self.reads = 0
        """Vectors that a call reads, once it is compiled; what is only passed on is not read."""
        self.way: Callable[..., Any] = self.exact
        self._fused: Program | None = None

    def __call__(self, *args: Any, into: Sequence[Tensor] = ()) -> Any:
        return self.way(*args, into=into)

    def eager(self, *args: Any, into: Sequence[Tensor] = ()) -> Any:
        """The handler as it is written."""
        return self.handler(*args)

    def blocked(self, *args: Any, block: int = BLOCKS[1], into: Sequence[Tensor] = ()) -> Any:
        """Block by block: exact, as a handler works on each element by itself. No compiler is needed."""
        inputs = leaves(args)
        size = next((len(t) for t in inputs if t.dim()), 0)
        if size <= block:
            return self.eager(*args)
        out = self._vectors(size, into)
        rows = []
        for begin in range(0, size, block):
            part = slice(begin, begin + block)
            pieces = [t[part] if t.dim() else t for t in inputs]
            new = self._made(pieces, self.handler(*rebuild(args, pieces)))
            for whole, t in zip(out, [t for t in new if t.dim()], strict=True):
                whole[part].copy_(t)
            rows.append([t for t in new if not t.dim()])
        columns = list(zip(*rows, strict=True))
        alike = len(columns) - self.sums
        scalars = [column[0] if k < alike else reduce(operator.add, column) for k, column in enumerate(columns)]
        return self._answer(inputs, out, scalars)

    def exact(self, *args: Any, into: Sequence[Tensor] = ()) -> Any:
        """Eager, or in blocks where these are faster: by the size, so that two runs have the same bits."""
        large = any(len(t) >= LARGE and t.is_cpu for t in leaves(args) if t.dim())
        return self.blocked(*args, into=into) if large else self.eager(*args)

    def fused(self, *args: Any, into: Sequence[Tensor] = ()) -> Any:
        """As one compiled loop; `warm` compiles it, for one length."""
        assert self._fused is not None, "call warm(size) first"
        return self._run(self._fused, *args, into=into)

    def warm(self, size: int, repeats: int = 3) -> dict[str, float]:
        """Compile for vectors [size], race all ways, and take the fastest: the best seconds of each.

        Large models are spared two things: eager, which makes a dozen vectors and is never the fastest for them, and arguments
        that are all different, so that all ways read somewhat less than in a real call. Raises whatever a compiler raises;
        calls go the fastest of the other ways then.
        """
        like = leaves(self.args)
        large = size >= LARGE and any(t.is_cpu for t in like if t.dim())
        keys = [(t.dtype, t.device) if large else k for k, t in enumerate(like)]
        ones = {key: vector(size, t.dtype, t.device).fill_(1) for key, t in zip(keys, like, strict=True) if t.dim()}
        inputs = [ones[key] if t.dim() else t for key, t in zip(keys, like, strict=True)]
        args = rebuild(self.args, inputs)
        ways: dict[str, Callable[..., Any]] = {} if large else {"eager": self.eager}
        for block in BLOCKS:
            if block < size:
                ways[f"in blocks of {block}"] = partial(self.blocked, block=block)
        seconds = dict.fromkeys(ways, math.inf)
        fused: dict[str, Program] = {}
        try:
            for name, program in self._programs(size):
                self._run(program, *args)  # compiles
                fused[name], seconds[name] = program, math.inf
                ways[name] = partial(self._run, program)
        finally:
            for _ in range(repeats):
                for name in ways:
                    start = time.perf_counter()
                    ways[name](*args)
                    if self.new and self.new[0].is_cuda:
                        torch.cuda.synchronize()
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
            fastest = min(seconds, key=lambda name: seconds[name])
            if fused:
                self._fused = fused[min(fused, key=lambda name: seconds[name])]
            self.way = self.fused if fastest in fused else ways[fastest]
        return seconds

    # parts

    def _run(self, program: Program, *args: Any, into: Sequence[Tensor] = ()) -> Any:
        inputs = leaves(args)
        size = next((len(t) for t in inputs if t.dim()), 0)
        if size != self.size:
            raise ValueError(f"a kernel for vectors of {self.size} numbers was given {size}: warm one up for these")
        out = self._vectors(size, into)
        return self._answer(inputs, out, program(inputs, out))

    def _vectors(self, size: int, into: Sequence[Tensor]) -> list[Tensor]:
        mine = [t for t in self.new if t.dim()]
        return [*(vector(size, t.dtype, t.device) for t in mine[: len(mine) - len(into)]), *into]

    def _made(self, inputs: list[Tensor], result: Any) -> list[Tensor]:
        """Those leaves of a result that are new, in the order of `new`."""
        made: dict[int, Tensor] = {}
        for k, t in zip(self.place, leaves(result), strict=True):
            if k >= len(inputs):
                made.setdefault(k, t)
        return [made[k] for k in sorted(made)]

    def _answer(self, inputs: list[Tensor], vectors: list[Tensor], scalars: list[Tensor]) -> Any:
        """The result that is made of arguments, new vectors and new scalars."""
        v, s = iter(vectors), iter(scalars)
        known = inputs + [next(v) if t.dim() else next(s) for t in self.new]
        return rebuild(self.result, [known[k] for k in self.place])

    def _programs(self, size: int) -> Iterator[tuple[str, Program]]:
        """The handler as two programs: its scalars, in double precision and once, and one loop over the vectors. The second
        has ordinary stores, or such as go past the cache."""
        from torch._subclasses import FakeTensorMode  # which take a second to import
        from torch.fx.experimental.proxy_tensor import make_fx

        like = leaves(self.args)
        if any(t.is_cpu for t in like) and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise RuntimeError("no C++ compiler was found")
        with FakeTensorMode():
            fake = [torch.empty(size if t.dim() else (), dtype=t.dtype, device=t.device) for t in like]
            traced = make_fx(lambda *into: self._made(list(into), self.handler(*rebuild(self.args, list(into)))))(*fake)
        traced.graph.eliminate_dead_code()
        used = [bool(n.users) for n in traced.graph.nodes if n.op == "placeholder"]
        self.reads = sum(u and t.dim() for u, t in zip(used, like, strict=True))
        self.size = size
        yield "fused", _program(traced, torch.compile)
        aligned = [t for t in self.new if t.dim() and t.is_cpu and t.dtype is torch.float32 and 4 * size >= PAGE]
        if aligned and stores.known():
            yield "fused, past the cache", _program(traced, stores.past_cache)


def _program(traced: fx.GraphModule, compiler: Callable[..., Any]) -> Program:
    """What is computed of scalars alone apart from the loop over the vectors, in which it would be done for each element."""
    *nodes, end = traced.graph.nodes
    new: list[fx.Node] = list(end.args[0])
    flat = {n: isinstance(n.meta.get("val"), Tensor) and not n.meta["val"].dim() for n in nodes}
    alone: set[fx.Node] = set()
    for n in nodes:
        if flat[n] and all(m in alone for m in n.all_input_nodes):
            alone.add(n)
    crossing = [n for n in nodes if n in alone and any(user not in alone and user is not end for user in n.users)]
    vectors = [n for n in new if not flat[n]]
    early, late = ([n for n in new if flat[n] and (n in alone) == so] for so in (True, False))

    first, second = fx.Graph(), fx.Graph()
    head: dict[fx.Node, fx.Node] = {}
    for n in nodes:
        if n in alone:
            head[n] = first.node_copy(n, head.__getitem__)
    first.output(tuple(head[n] for n in early + crossing))
    body: dict[fx.Node, fx.Node] = {}
    for k, n in enumerate([n for n in nodes if n.op == "placeholder" and n not in alone] + crossing):
        body[n] = second.placeholder(f"in{k}")
    out = [second.placeholder(f"out{k}") for k in range(len(vectors))]
    for n in nodes:
        if n not in alone and n not in body:
            body[n] = second.node_copy(n, body.__getitem__)
    for buffer, n in zip(out, vectors, strict=True):
        second.call_function(torch.ops.aten.copy_.default, (buffer, body[n]))
    second.output(tuple(body[n] for n in late))

    scalars = fx.GraphModule(traced, first)
    # what is used twice is computed once, so that sums are added up in the loop that stores what they are of
    options = {"realize_reads_threshold": 1}
    loop = compiler(fx.GraphModule(traced, second), fullgraph=True, dynamic=False, options=options)
    order = [(early + late).index(n) for n in new if flat[n]]

    def run(inputs: list[Tensor], buffers: list[Tensor]) -> list[Tensor]:
        found = scalars(*[t for t in inputs if not t.dim()])
        mine, crossing = found[: len(early)], found[len(early) :]
        # each a tensor of its own: else every way in which arguments can be the same tensor is compiled apart
        sums = loop(*[t.detach() for t in inputs if t.dim()], *(t.detach() for t in crossing), *buffers)
        every = [*mine, *sums]
        return [every[k] for k in order]

    return run


_kernels: dict[Any, Kernel] = {}
_alone = threading.Lock()


def kernel(handler: Callable[..., Any], *args: Any, size: int = 0, sums: int = 0) -> Kernel:
    """The kernel of a method's handler for arguments like ``args`` and vectors [size]: one in a process for each method (a
    value), handler, structure, size, dtype and device."""
    parts = [(t.dim(), t.dtype, t.device) for t in leaves(args)]
    key = (
        getattr(handler, "__self__", None),
        getattr(handler, "__func__", handler),
        repr(rebuild(args, parts)),
        size,
        sums,
    )
    with _alone:
        if key not in _kernels:
            _kernels[key] = Kernel(handler, *args, sums=sums)
        return _kernels[key]


@dataclass(frozen=True)
class Visit:
    """What a server does with a message, so that it can be done in one pass."""

    method: ServerMethod

    def __call__(self, s: Any, own: Any, msg: Message, *sums: Tensor) -> tuple[Any, Any, Message, Tensor]:
        """What ``serve`` gives, its reply in memory of its own, and a sum that is not finite if any number is not: of the
        message, of the states or of the reply."""
        old = leaves((s, own))
        s, own, reply = self.method.serve(s, own, msg, *sums)
        seen = [*old, *leaves((s, own, msg))]
        numbers = {id(t): t for t in leaves((msg, s, own, reply)) if t.is_floating_point()}
        passed = {id(t) for t in old}
        new = [t for i, t in numbers.items() if i not in passed]
        vectors = [t for t in new if t.dim()]
        total = reduce(lambda total, t: torch.addcmul(total, t, t), vectors[1:], vectors[0] * vectors[0])
        squares = total.sum(dtype=torch.promote_types(total.dtype, torch.float32))
        squares = reduce(operator.add, [t * t for t in new if not t.dim()], squares)
        parts = []
        for t in leaves(reply):
            parts.append(t.clone() if any(t is other for other in seen) else t)
            seen.append(t)
        return s, own, rebuild(reply, parts), squares


def _sums(method: ServerMethod) -> Callable[..., Any]:
    return method.sums


@dataclass(frozen=True)
class Rated:
    """A handler with the rate before its other arguments, 0-dim: one that is compiled would else keep the number that a `Dial` has
    then."""

    method: ServerMethod
    handler: Callable[[ServerMethod], Callable[..., Any]]
    """From a method to its handler."""

    def __call__(self, lr: Tensor, *args: Any) -> Any:
        return self.handler(with_rate(self.method, Dial(lr)))(*args)


class Visits:
    """The visits of a `ServerMethod` at models of one size: ``serve``, and the sums that it needs, as kernels."""

    def __init__(self, method: ServerMethod, x: Tensor) -> None:
        """For models like ``x`` [d]."""
        self.size = len(x)
        small = torch.ones(2, dtype=x.dtype, device=x.device)
        s, own, reply = method.admit(method.init_server(small))
        msg = method.push(method.local(method.init(reply), small))
        lr = rate_of(method)
        self.dial = lr if isinstance(lr, Dial) else None
        first = *self._rate(), s, own, msg
        sums = method.sums(s, own, msg)
        rated: Callable[[Any], Any] = (lambda h: h(method)) if self.dial is None else (lambda h: Rated(method, h))
        self.sums = kernel(rated(_sums), *first, size=self.size, sums=len(sums)) if sums else None
        self.serve = kernel(method.serve, s, own, msg, *sums, size=self.size)
        self.visit = kernel(rated(Visit), *first, *sums, size=self.size, sums=1)
        self.raced = False

    def _rate(self) -> tuple[Tensor, ...]:
        """The rate as the first argument of what is compiled; nothing where it is no `Dial`."""
        return () if self.dial is None else (torch.as_tensor(self.dial.value, dtype=torch.float64),)

    def __call__(self, s: Any, own: Any, msg: Message, into: Sequence[Tensor] = ()) -> tuple[Any, Any, Message, Tensor]:
        """What `Visit` gives, the fastest way, vectors of the reply ``into`` memory that is ready for them."""
        new: tuple[Any, Any, Message, Tensor]
        first = *self._rate(), s, own, msg
        new = self.visit(*first, *(self.sums(*first) if self.sums else ()), into=into)
        return new

    def exact(self, s: Any, own: Any, msg: Message) -> tuple[Any, Any, Message]:
        """What ``serve`` gives, whatever has been compiled or measured: the same bits each time."""
        sums = self.sums.exact(*self._rate(), s, own, msg) if self.sums else ()
        new: tuple[Any, Any, Message] = self.serve.exact(s, own, msg, *sums)
        return new

    def transaction(self, s: Any, own: Any, msg: Message, into: Sequence[Tensor] = ()) -> tuple[Any, Any, Message]:
        """What ``serve`` gives, checked: `NotFinite` where a number is not. ``msg`` may be lent: no state has memory of it. Once `race`
        has found the fastest way it goes that way, vectors of the reply ``into`` memory that is ready for them."""
        if self.raced:
            *new, squares = self(s, own, msg, into)
            sound = float(squares) < math.inf
        else:
            new = [*self.exact(s, own, msg)]
            sound = tame(msg) and finite(new[2])
        s, own, reply = checked(msg, (new[0], new[1], new[2]), sound)
        s, own = apart((s, own), msg)
        return s, own, reply

    def race(self) -> dict[str, float]:
        """Compile what `Visit` does, and find the fastest way: the best seconds of each. Raises what a compiler raises."""
        try:
            seconds = self.visit.warm(self.size)
            extra = self.sums.warm(self.size) if self.sums else {}
        finally:
            self.raced = True  # with or without a compiler
        return {way: s + extra.get(way, min(extra.values(), default=0.0)) for way, s in seconds.items()}
