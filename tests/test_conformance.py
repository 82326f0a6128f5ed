"""What every method must be, whatever it does: these tests run over all that the methods folder holds and name none."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import math
import pickle
import re
import textwrap
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from conftest import Bowl
from torch import Tensor

import offbeat as ob
from offbeat.core.master import Correction
from offbeat.core.rates import with_rate
from offbeat.core.values import parse

METHODS = ob.methods.all_methods()
SERVER = [cls for cls in METHODS if issubclass(cls, ob.ServerMethod)]
VALUES = [cls for cls in vars(ob.methods).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
VALUES = [
    cls for cls in VALUES if cls.__module__.startswith(ob.methods.__name__)
]  # methods, and what they are built of
CONSTRUCTORS = {
    name: value for space in (ob, ob.methods) for name, value in vars(space).items() if isinstance(value, type)
}

BOWL = Bowl()


def named(cls: type) -> str:
    return cls.__name__


each_method = pytest.mark.parametrize("cls", METHODS, ids=named)
each_server_method = pytest.mark.parametrize("cls", SERVER, ids=named)
each_value = pytest.mark.parametrize("cls", VALUES, ids=named)


def numbers(cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that hold a number, with their defaults."""
    hints = get_type_hints(cls)
    found = {f.name: f.default for f in dataclasses.fields(cls)}
    kinds = {name: {hints[name], *getattr(hints[name], "__args__", ())} for name in found}
    return {name: default for name, default in found.items() if kinds[name] & {int, float} and bool not in kinds[name]}


def simulate(method: ob.Method, **options: Any) -> ob.Run:
    cluster = ob.Cluster(4, ob.Gamma(cv=0.3))
    return ob.simulate(method, BOWL, **{"cluster": cluster, "gradients": 300} | options)


# ---------------------------------------------------------------- values


def test_there_are_methods_and_what_they_are_built_of() -> None:
    assert len(METHODS) == len(set(METHODS)) >= 10
    assert SERVER
    assert set(METHODS) < set(VALUES)
    assert sum(issubclass(cls, Correction) for cls in VALUES) >= 4


@each_value
def test_it_is_a_value(cls: type) -> None:
    """Built with no arguments, frozen, equal to its like, hashable, picklable, printable and read back without eval."""
    value = cls()
    assert value == cls()
    assert hash(value) == hash(cls())
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value
    assert eval(repr(value), dict(CONSTRUCTORS)) == value
    assert parse(repr(value), CONSTRUCTORS) == value
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))


@each_method
def test_its_repr_holds_every_hyper_parameter(cls: type[ob.Method]) -> None:
    method = with_rate(cls(), 0.123 * ob.Warmup(7))
    assert parse(repr(method), CONSTRUCTORS) == method
    assert method == cls() or "0.123" in repr(method)


@each_method
def test_it_has_a_name_on_the_command_line(cls: type[ob.Method]) -> None:
    """Unique, in kebab case, and found under it and under the class's name."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cls.name)
    assert [other for other in METHODS if other.name.replace("-", "") == cls.name.replace("-", "")] == [cls]
    assert cls.name.replace("-", "") == cls.__name__.lower()
    assert ob.methods.find(cls.name) is ob.methods.find(cls.__name__) is cls
    assert getattr(ob.methods, cls.__name__) is cls


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    name = METHODS[0].name
    with pytest.raises(ValueError, match=rf"unknown method '{name}x': did you mean .*{name}"):
        ob.methods.find(name + "x")


TOO_BAD: dict[str, tuple[Any, ...]] = {
    # what no method can mean, beyond -1 and nan, which no number may be
    "lr": (0, math.inf, "fast"),
    "momentum": (1.0, 1.5),
    "weight_decay": (math.inf,),
    "period": (0, 1.5, math.inf),
    "beta": (1.5,),
    "kappa": (0.0, math.inf),
    "eps": (0.0,),
    "betas": ((1.0, 0.9), (0.9, -0.1), (0.9,)),
}
REFUSED = [
    pytest.param(cls, field, value, id=f"{cls.__name__}-{field}-{value}")
    for cls in VALUES
    for field in numbers(cls) | {"betas": None}
    if field in {f.name for f in dataclasses.fields(cls)}
    for value in ((-1, math.nan) if field != "betas" else ()) + TOO_BAD.get(field, ())
]


@pytest.mark.parametrize(("cls", "field", "value"), REFUSED)
def test_a_bad_value_is_refused_by_name(cls: type, field: str, value: Any) -> None:
    """A ``ValueError`` that names class, field, value and cure."""
    with pytest.raises(ValueError, match=r"must .") as error:
        cls(**{field: value})
    assert str(error.value).startswith(f"{cls.__name__}.{field} = {value!r}: ")


# ---------------------------------------------------------------- the text


@each_value
def test_its_docstring_has_the_paper(cls: type) -> None:
    """A reference: arXiv number, or venue and year."""
    text = cls.__dict__["__doc__"]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b[A-Z]{3,}\w* (19|20)\d\d\b", text), (
        "give the paper's arXiv number or venue"
    )
    assert re.search(r"[A-Z]\w+( et al)?[.,]", text), "give the authors"


@each_method
def test_its_docstring_says_what_differs_from_the_paper(cls: type[ob.Method]) -> None:
    text = " ".join(cls.__dict__["__doc__"].split())
    assert re.search(r"Differences from the paper: \w.{10}", text)
    assert re.search(r"[Ee]valuat", text), "say at which point the model is evaluated"
    assert "eight decay" in text, "say where weight decay acts, or that there is none"


@each_value
def test_every_field_has_a_docstring(cls: type) -> None:
    """An attribute docstring after each field, which is also its help on the command line."""
    for owner in cls.__mro__[:-1]:
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or "KW_ONLY" in ast.unparse(node.annotation):
                continue
            said = (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            )
            assert said, f"{owner.__name__}.{ast.unparse(node.target)} has no docstring below it"
            assert len(after.value.value) > 10


@each_value
def test_it_is_no_bundle_of_flags(cls: type) -> None:
    """Kinds are classes: no field is a free string, and no handler asks for a type."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = {hints[field.name], *getattr(hints[field.name], "__args__", ())}
        assert str not in kinds, f"{cls.__name__}.{field.name} is a flag"
    calls = [n for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))) if isinstance(n, ast.Call)]
    assert not {"isinstance", "issubclass", "type", "hasattr"} & {ast.unparse(call.func) for call in calls}


# ---------------------------------------------------------------- whole runs


@each_method
def test_the_same_run_twice_is_the_same_bits_and_another_seed_is_another_run(cls: type[ob.Method]) -> None:
    a, b, other = (simulate(with_rate(cls(), 0.01), gradients=100, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.x, b.x)
    assert a.trace == b.trace
    assert a.seconds == b.seconds
    assert a.figures == b.figures
    assert other.trace != a.trace
    if issubclass(cls, ob.ServerMethod) and not cls.gated:  # others may do the same in any order of their workers
        assert not torch.equal(other.x, a.x)


@each_method
def test_it_converges(cls: type[ob.Method]) -> None:
    """Four uneven workers, a noisy convex bowl: the loss falls to below a tenth of what it was."""
    run = simulate(with_rate(cls(), 0.02), gradients=600)
    assert run.figures["loss"] < 0.1 * BOWL.evaluate(BOWL.x0())["loss"]


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_keeps_the_parameters_dtype_under_a_schedule(cls: type[ob.Method], dtype: torch.dtype) -> None:
    method = with_rate(cls(), 0.01 * ob.Warmup(30) * ob.Cosine(200, floor=0.1))
    run = ob.simulate(method, Bowl(dtype=dtype), ob.Cluster(4), gradients=100)
    assert run.x.dtype == dtype
    assert run.x.shape == BOWL.x0().shape
    assert run.figures["loss"] < BOWL.evaluate(BOWL.x0())["loss"]


@each_method
def test_a_schedule_matters(cls: type[ob.Method]) -> None:
    steady, falling = (with_rate(cls(), lr) for lr in (0.01, 0.01 * ob.Cosine(200)))
    if steady != falling:
        assert not torch.equal(simulate(steady, gradients=80).x, simulate(falling, gradients=80).x)


@each_method
def test_workers_may_come_and_go(cls: type[ob.Method]) -> None:
    """A join, a leave, two crashes, and a comeback: the run ends, finite and better than it began."""
    events = (ob.Join(3, 5.5), ob.Leave(1, 10.0), ob.Crash(0, 20.0), ob.Join(0, 30.0), ob.Crash(2, 40.0))
    run = simulate(with_rate(cls(), 0.01), cluster=ob.Cluster(3, ob.Gamma(cv=0.3), events))
    assert bool(torch.isfinite(run.x).all())
    assert run.figures["loss"] < BOWL.evaluate(BOWL.x0())["loss"]
    assert sorted(i.what for i in run.trace.incidents) == ["crashed", "crashed", "joined", "joined", "left"]
    assert len(run.trace) == 300


# ---------------------------------------------------------------- handlers


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [leaf for branch in branches for leaf in leaves(branch)]


def shape(tree: Any) -> Any:
    """What a kernel that writes into spare buffers relies on: structure, shapes, dtypes."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    assert isinstance(tree, tuple), f"a state holds {tree!r}: only tensors and tuples of them may be there"
    return type(tree), [shape(branch) for branch in tree]


def pure(handler: Callable[..., Any], *args: Any) -> Any:
    """Call ``handler``, twice, and insist that it leaves its arguments bitwise alone and draws nothing."""
    before = copy.deepcopy(args)
    result = handler(*args)
    after, kept = leaves(args), leaves(before)
    assert [(t.shape, t.dtype) for t in after] == [(t.shape, t.dtype) for t in kept]
    assert all(torch.equal(a, b) for a, b in zip(after, kept, strict=True)), (
        f"{handler.__qualname__} changed an argument"
    )
    again = handler(*before)
    assert all(torch.equal(a, b) for a, b in zip(leaves(result), leaves(again), strict=True)), "it drew something"
    return result


WORKER_STATE = ("init", "local", "pull", "load", "restart", "merge", "receive", "settle", "absorb")
"""Handlers that answer with the state of the worker, whole and alone."""


def checked(method: ob.Method, seen: list[set[str]]) -> ob.Method:
    """The method with every public function wrapped in `pure`, those of its inner method too, if it has one.

    ``seen`` gets the shapes of the workers' states, a set for each method.
    """
    shapes: set[str] = set()
    seen.append(shapes)

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def handler(self: ob.Method, *args: Any) -> Any:
            result = pure(lambda *a: function(self, *a), *args)
            if name in WORKER_STATE:
                shapes.add(repr(shape(result)))
            return result

        return handler

    public = {name: f for name, f in inspect.getmembers(type(method), inspect.isfunction) if not name.startswith("_")}
    wrapped = object.__new__(type("Checked", (type(method),), {name: wrap(name, f) for name, f in public.items()}))
    wrapped.__dict__.update(method.__dict__)
    if hasattr(method, "inner"):
        wrapped.__dict__["inner"] = checked(method.inner, seen)
    return wrapped


@each_method
def test_handlers_are_pure_in_a_run_where_workers_come_and_go(cls: type[ob.Method]) -> None:
    """Of whatever kind: in a whole run no handler changes an argument or draws; workers' states keep their shape."""
    seen: list[set[str]] = []
    events = (ob.Join(3, 3.5), ob.Leave(1, 6.0), ob.Crash(0, 7.0))
    cluster = ob.Cluster(3, ob.Gamma(cv=0.3), events)
    method = with_rate(cls(), 0.01 * ob.Warmup(5))
    run = simulate(checked(method, seen), cluster=cluster, gradients=40)
    assert [len(shapes) for shapes in seen] == [1] * len(seen)
    assert torch.equal(run.x, simulate(method, cluster=cluster, gradients=40).x)


SETTINGS = {
    "float32": (torch.float32, 0.01),
    "float64": (torch.float64, 0.01),
    "schedule": (torch.float32, 0.01 * ob.Warmup(5)),
}


@each_server_method
@pytest.mark.parametrize("setting", SETTINGS)
def test_server_handlers_are_pure_and_keep_the_shape_of_their_states(cls: type[ob.ServerMethod], setting: str) -> None:
    """Every handler, over visits of workers that come and go: arguments bitwise as before, states shaped as before."""
    dtype, lr = SETTINGS[setting]
    method, bowl = with_rate(cls(), lr), Bowl(dtype=dtype)
    x0 = bowl.x0()
    s = pure(method.init_server, x0)
    seats, workers, replies, shapes = {}, {}, set(), (shape(s), None, None)
    for t in range(24):
        i = t % 3
        if t == 12:
            s = pure(method.leave, s, seats.pop(i))
            assert shape(s) == shapes[0]
            del workers[i]
        if i not in workers:
            s, seats[i], reply = pure(method.admit, s)
            workers[i] = pure(method.init, reply)
            replies.add(repr(shape(reply)))
            shapes = (shapes[0], shapes[1] or shape(seats[i]), shapes[2] or shape(workers[i]))
            assert (shape(s), shape(seats[i]), shape(workers[i])) == shapes
        for step in range(method.period):
            point = pure(method.params, workers[i])
            assert shape(point) == shape(x0)
            workers[i] = pure(method.local, workers[i], bowl.grad(point, i, method.period * t + step)[0])
            assert shape(workers[i]) == shapes[2]
        message = pure(method.push, workers[i])
        figures = pure(method.measure, s, seats[i], message)
        assert all(figure.shape == () for figure in figures.values())
        s, seats[i], reply = pure(method.serve, s, seats[i], message)
        replies.add(repr(shape(reply)))
        workers[i] = pure(method.pull, workers[i], reply)
        assert (shape(s), shape(seats[i]), shape(workers[i])) == shapes
        assert shape(pure(method.master, s)) == shape(x0)
        assert all(bool(torch.isfinite(leaf).all()) for leaf in leaves((s, seats[i], workers[i])))
    assert len(replies) == 1, "a first reply is like any other"
    assert len({repr(shape(pure(method.push, w))) for w in workers.values()}) == 1


@each_server_method
def test_a_run_of_one_worker_is_deterministic_whatever_the_seed(cls: type[ob.ServerMethod]) -> None:
    """With one worker there is no order to draw: the seed moves the clock only."""
    cluster = ob.Cluster(1, ob.Gamma(cv=0.3))
    a, b = (simulate(with_rate(cls(), 0.01), cluster=cluster, gradients=50, seed=seed) for seed in (1, 2))
    assert torch.equal(a.x, b.x)
    assert a.seconds != b.seconds
