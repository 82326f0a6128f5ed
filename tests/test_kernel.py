"""Handlers as kernels: the same in every way, whatever the arguments share; compiled once; memory that comes back."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from conftest import one_of
from torch import Tensor

import offbeat as ob
from offbeat.core.descent import count
from offbeat.core.master import Correction, Stale
from offbeat.core.rates import Dial, with_rate
from offbeat.core.tree import leaves, rebuild
from offbeat.engines import kernel as kernels
from offbeat.engines import stores
from offbeat.engines.kernel import Kernel, Visits, kernel, vector
from offbeat.methods import all_methods

D = 50
SERVERS = [cls for cls in all_methods() if issubclass(cls, ob.ServerMethod)]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler


@pytest.fixture(autouse=True)
def fresh() -> None:
    kernels._kernels.clear()
    torch._dynamo.reset()


def clipped(bound: float) -> ob.Method:
    return ob.ASGD(0.1 * ob.Warmup(4), momentum=0.9, correction=Clip(bound))


@dataclass(frozen=True)
class Clip(Correction):
    """A gradient of a Euclidean norm of at most ``bound``: a method of this test's own that needs a sum."""

    bound: float = 1.0

    def sums(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, ...]:
        return ((stale.g.double() ** 2).sum(),)

    def correct(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, Any, Any]:
        (squares,) = stale.sums
        return stale.g * (self.bound / squares.sqrt()).clamp(max=1.0), memory, mine


METHODS: list[ob.Method] = [cls() for cls in SERVERS]
METHODS += [ob.GapAware(correction=ob.methods.GlobalGapPenalty()), ob.SSP(ob.DanaGA()), clipped(1.0)]  # type: ignore[attr-defined]


def visits(method: ob.ServerMethod, handle: Callable[..., Any], d: int = D) -> list[list[Tensor]]:
    """The states and replies of some visits by two workers, of which one comes when the other has been."""
    generator = torch.Generator().manual_seed(0)
    s = method.init_server(torch.randn(d, generator=generator))
    own: list[Any] = [None, None]
    w: list[Any] = [None, None]
    found = []
    for k in range(8):
        i = 0 if k < 3 else k % 2
        if own[i] is None:
            s, own[i], reply = method.admit(s)
            w[i] = method.init(reply)
        for _ in range(method.length(w[i])):
            w[i] = method.local(w[i], 0.1 * torch.randn(d, generator=generator))
        s, own[i], reply = handle(s, own[i], method.push(w[i]))
        found.append(leaves((s, own[i], reply)))  # kept: nothing may be written over what somebody still has
        w[i] = method.pull(w[i], reply)
    return found


def answers(served: Visits) -> Callable[..., Any]:
    """What ``served`` gives without the sum that tells whether it is finite."""
    return lambda *args: served(*args)[:3]


def agree(mine: list[list[Tensor]], theirs: list[list[Tensor]], exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=False)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: repr(m)[:40])
def test_blocks_give_the_same_bits_as_the_whole(method: ob.ServerMethod) -> None:
    """In blocks of 16 of 50 numbers, the last one short. With sums only to rounding, as they are added in another order."""
    served = Visits(method, torch.zeros(D))

    def handle(s: Any, own: Any, msg: Any) -> Any:
        sums = served.sums.blocked(s, own, msg, block=16) if served.sums else ()
        return served.serve.blocked(s, own, msg, *sums, block=16)

    agree(visits(method, handle), visits(method, method.serve), exactly=not served.sums)


@needs_compiler
@pytest.mark.parametrize("method", one_of(3, METHODS), ids=lambda m: repr(m)[:40])
def test_fused_is_eager(method: ob.ServerMethod) -> None:
    """Two workers, other arguments the same tensor at each visit: one compilation for all of them."""
    served = Visits(method, torch.zeros(D))
    for k in filter(None, (served.visit, served.sums)):
        k.warm(D, repeats=1)
        k.way = k.fused
    with torch.compiler.set_stance("fail_on_recompile"):
        fused = visits(method, answers(served))
    agree(fused, visits(method, method.serve))


LOCAL = ob.SGD(0.1 * ob.Warmup(5), momentum=0.9, nesterov=True, weight_decay=0.01)
PERIODIC = [cls for cls in all_methods() if issubclass(cls, ob.PeriodicMethod)]


def absorbed(method: ob.PeriodicMethod, local: Callable[..., Any], absorb: Callable[..., Any]) -> list[list[Tensor]]:
    """The states of a peer over some steps, each followed by an average with a peer that is a little off."""
    generator = torch.Generator().manual_seed(1)
    w, found = method.init(torch.randn(D, generator=generator)), []
    for _ in range(4):
        w = local(w, 0.1 * torch.randn(D, generator=generator))
        mean = method.contribute(w)
        if mean is not None:
            mean = rebuild(mean, [0.9 * t for t in leaves(mean)])
        w = absorb(w, mean)
        found.append(leaves(w))
    return found


@needs_compiler
@pytest.mark.parametrize("cls", one_of(3, PERIODIC), ids=lambda c: c.__name__)
def test_a_periodic_methods_handlers_are_the_same_in_every_way(cls: type[ob.PeriodicMethod]) -> None:
    method = cls(inner=ob.Local(LOCAL)) if issubclass(cls, ob.OuterMethod) else cls(rule=LOCAL)  # type: ignore[call-arg]
    w = method.init(torch.zeros(D))
    local = kernel(method.local, w, torch.zeros(D))
    absorb = kernel(method.absorb, w, method.contribute(w))
    eager = absorbed(method, method.local, method.absorb)
    blocked = absorbed(method, lambda *a: local.blocked(*a, block=16), lambda *a: absorb.blocked(*a, block=16))
    agree(blocked, eager, exactly=True)
    for k in (local, absorb):
        k.warm(D, repeats=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        agree(absorbed(method, local.fused, absorb.fused), eager)


@needs_compiler
def test_a_gossiping_peers_handlers_are_kernels_too() -> None:
    """Arguments may be mappings, and numbers beside tensors are part of the structure."""
    method = ob.methods.DPSGD(rule=LOCAL)  # type: ignore[attr-defined]
    w = method.init(torch.randn(D))
    args = w, {1: torch.randn(D), 3: torch.randn(D)}, {1: 0.25, 3: 0.25}, 0.5
    merge = kernel(method.merge, *args)
    merge.warm(D, repeats=1)
    eager = leaves(method.merge(*args))
    agree([leaves(merge.fused(*args)), leaves(merge.blocked(*args, block=16))], [eager, eager])
    assert kernel(method.merge, *args) is merge
    assert kernel(method.merge, *args[:2], {1: 0.3, 3: 0.2}, 0.5) is not merge


@needs_compiler
@pytest.mark.parametrize("method", one_of(5, METHODS), ids=lambda m: repr(m)[:40])
def test_a_visit_knows_what_is_not_finite(method: ob.ServerMethod) -> None:
    """In every way: a message, a state or a reply of which one number is none. A reply has memory of its own."""
    size, generator = 37, torch.Generator().manual_seed(0)
    s, own, reply = method.admit(method.init_server(torch.randn(size, generator=generator)))
    served = Visits(method, torch.zeros(size))
    served.visit.warm(size, repeats=1)
    w = method.init(reply)
    for _ in range(method.length(w)):
        w = method.local(w, torch.randn(size, generator=generator))
    msg = method.push(w)
    sums = served.sums(s, own, msg) if served.sums else ()
    room = torch.zeros(len([t for t in leaves(reply) if t.dim()]), kernels.ALIGNED)
    into = [row[:size].to(t.dtype) for row, t in zip(room, [t for t in leaves(reply) if t.dim()], strict=True)]
    ways = served.visit.eager, partial(served.visit.blocked, block=16), served.visit.fused
    for way in ways:
        new, before = way(s, own, msg, *sums, into=into), leaves((s, own, msg))
        assert torch.isfinite(new[3])
        replies, states = leaves(new[2]), leaves(new[:2])
        assert not {t.data_ptr() for t in replies} & {t.data_ptr() for t in [*states, *before] if t.dim()}
        if way != ways[0]:
            assert [t.data_ptr() for t in replies if t.dim()] == [t.data_ptr() for t in into]
        for t in leaves(msg):
            for bad in (math.nan, math.inf):
                parts = [u.clone() if u is t else u for u in leaves(msg)]
                next(u for u, v in zip(parts, leaves(msg), strict=True) if v is t).reshape(-1)[-1] = bad
                assert not torch.isfinite(way(s, own, rebuild(msg, parts), *sums)[3]), (way, bad)


@needs_compiler
def test_stores_past_the_cache_change_no_bit() -> None:
    """At a length whose last numbers fill no register. What another thread compiles meanwhile has ordinary stores."""
    if not stores.known():
        pytest.skip("no such stores are known for this processor")
    from torch._inductor.utils import run_and_get_code

    size = kernels.PAGE // 4 + 13
    s, own, _ = (method := ob.DanaZero(0.1)).admit(method.init_server(torch.randn(size)))
    served, g = Kernel(method.serve, s, own, torch.ones(2)), torch.randn(size)
    raced = served.warm(size, repeats=1)
    assert {"fused", "fused, past the cache"} <= raced.keys()
    codes, answers = [], []
    for _, program in served._programs(size):
        answer, code = run_and_get_code(served._run, program, s, own, g)
        answers.append(leaves(answer))
        codes.append("".join(code))
    loop = torch.compile(lambda x: x * 2 + 1, fullgraph=True)
    stores._compiling.on = True
    try:
        with ThreadPoolExecutor(1) as other:
            _, ordinary = run_and_get_code(other.submit(loop, g).result)
    finally:
        stores._compiling.on = False
    agree(answers[1:], answers[:1], exactly=True)
    assert ["_stream_ps" in code for code in [*codes, *ordinary]] == [False, True, False]


@needs_compiler
def test_a_schedule_compiles_once() -> None:
    """A hundred steps along a schedule with a warm-up, a cosine and a drop; another rate is another value of the method."""
    schedule = 0.1 * ob.Sequence(ob.Warmup(20), 20, ob.Cosine(60) * ob.MultiStep((30,)))
    method = ob.DanaZero(schedule)
    served = Visits(method, torch.zeros(D))
    torch._dynamo.utils.counters.clear()
    served.visit.warm(D, repeats=1)
    served.visit.way = served.visit.fused
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    s = t = method.init_server(torch.ones(D))
    s, own, _ = method.admit(s)
    t, seat, _ = method.admit(t)
    for k in range(100):
        g = torch.full((D,), 0.01 * k)
        s, own, sent, _ = served(s, own, g)
        t, seat, wanted = method.serve(t, seat, g)
        torch.testing.assert_close(sent, wanted, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.parametrize("method", [ob.DanaZero(), ob.DanaGA(), ob.GEM()], ids=lambda m: m.name)
def test_a_compiled_visit_hears_of_the_rate(method: ob.ServerMethod) -> None:
    dial = Dial(0.5)
    turned = with_rate(method, dial)
    visits = Visits(turned, torch.zeros(64))
    visits.race()
    s, own, _ = turned.admit(turned.init_server(torch.ones(64)))
    t, seat = s, own
    for lr in (0.5, 0.1, 0.0, 0.2):
        dial.value = lr
        g = torch.linspace(-1, 1, 64)
        s, own, sent, _ = visits(s, own, g)
        t, seat, wanted = with_rate(method, lr or Dial(0.0)).serve(t, seat, g)
        torch.testing.assert_close(sent, wanted, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_made_once_for_each_value() -> None:
    def served(method: ob.ServerMethod, dtype: torch.dtype = torch.float32, d: int = D) -> Kernel:
        return Visits(method, torch.zeros(d, dtype=dtype)).serve

    assert served(ob.DanaZero(0.1)) is served(ob.DanaZero(0.1))
    assert served(ob.DanaZero(0.1)) is not served(ob.DanaZero(0.2))
    assert served(ob.DanaZero(0.1)) is not served(ob.DanaGA(0.1))
    assert served(ob.DanaZero(0.1)) is not served(ob.DanaZero(0.1), torch.float64)
    assert served(ob.DanaZero(0.1)) is not served(ob.DanaZero(0.1), d=D + 1), "each is compiled for one length"


def test_without_a_compiler_a_visit_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    method = ob.DanaGA()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(kernels, "BLOCKS", (16, 32))
    served = Visits(method, torch.zeros(D))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        served.race()
    assert served.visit.way != served.visit.fused
    agree(visits(method, answers(served)), visits(method, method.serve), exactly=True)


@needs_compiler
def test_a_fused_kernel_refuses_vectors_of_another_length() -> None:
    served = Visits(ob.ASGD(), torch.zeros(D))
    served.serve.warm(D, repeats=1)
    with pytest.raises(ValueError, match=f"for vectors of {D} numbers was given {D + 1}"):
        visits(ob.ASGD(), served.serve.fused, D + 1)


class Count(NamedTuple):
    x: Tensor
    step: Tensor
    still: Tensor


def test_what_is_passed_on_is_not_copied() -> None:
    """A result that is an argument stays that argument, in its new place; equal results are one vector."""

    def handler(s: Count, g: Tensor) -> tuple[Count, Tensor]:
        x = s.x - g
        return Count(x, s.step + 1, s.x), x

    s, g = Count(torch.ones(D), count(torch.ones(1)), torch.zeros(D)), torch.ones(D)
    k = Kernel(handler, s, g)
    for way in (k.blocked, k.eager):
        new, reply = way(s, g, block=16) if way == k.blocked else way(s, g)
        assert new.still is s.x
        assert reply is new.x
    assert [t.dim() for t in k.new] == [1, 0]


def test_memory_comes_back_when_nobody_refers_to_it() -> None:
    size, cpu = kernels.PAGE // 4 + 8, torch.device("cpu")
    a = vector(size, torch.float32, cpu)
    where, part = a.data_ptr(), a.detach()[100:200].view(torch.uint8)
    del a
    assert vector(size, torch.float32, cpu).data_ptr() != where, "a view still refers to it"
    del part
    found = {t.data_ptr() for t in [vector(size, torch.float32, cpu) for _ in range(3)]}
    assert where in found


def test_visits_leave_no_garbage() -> None:
    """States that take turns live in the same few vectors, without waiting for the garbage collector."""
    method, d = ob.DanaZero(), kernels.PAGE // 4 + 16
    served = Visits(method, torch.zeros(d))
    s, own, _ = method.admit(method.init_server(torch.zeros(d)))
    places, g = set(), torch.ones(d)
    gc.disable()
    try:
        for _ in range(20):
            s, own, _ = served.serve.blocked(s, own, g, block=1 << 16)
            places |= {t.data_ptr() for t in leaves((s, own)) if t.dim()}
    finally:
        gc.enable()
    assert len(places) <= 8


def test_a_simulated_run_has_the_same_bits_in_blocks_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, cluster = ob.tasks.Quadratic(), ob.Cluster(4, ob.Gamma(cv=0.3), (ob.Leave(1, 4.0), ob.Join(1, 8.0)))
    methods = [ob.DanaGA(0.01), ob.GEM(), ob.EAMSGD(), ob.SSP(ob.DCASGD())]

    def runs() -> list[Tensor]:
        return [ob.simulate(m, problem, cluster, gradients=60).x for m in methods]

    whole = runs()
    assert all(len(x) > 8 for x in whole)
    blocked = Kernel.blocked
    served = []
    monkeypatch.setattr("offbeat.engines.ensemble.LARGE", 8)
    monkeypatch.setattr(kernels, "LARGE", 8)
    monkeypatch.setattr(Kernel, "blocked", lambda self, *args, into: served.append(1) or blocked(self, *args, block=8))
    agree([runs()], [whole], exactly=True)
    assert len(served) >= 4 * 60 // 8


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_that_one_thread_has_warmed_serves_another(threads: int) -> None:
    """A server compiles beside training: the threads that then serve find it compiled."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        method = ob.DanaZero(0.1 * ob.Warmup(5))
        served = Visits(method, torch.zeros(D))
        torch._dynamo.utils.counters.clear()
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(served.visit.warm, D, 1).result()
            served.visit.way = served.visit.fused
            found = other.submit(visits, method, answers(served)).result()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        agree(found, visits(method, method.serve))
    finally:
        torch.set_num_threads(before)
