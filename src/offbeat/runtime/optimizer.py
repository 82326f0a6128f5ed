"""The user's own optimizer as a descent rule: it takes the local steps, and the method does the rest."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import Rule, count
from ..core.method import GradientServer, Method, ServerMethod
from ..core.rates import Dial, dial_of, rate_of, with_rate
from ..core.schedule import Schedule
from ..core.server import ParameterServer
from ..core.tree import leaves
from ..log import WORKER
from ..tasks.flat import local
from .edits import OtherSteps
from .parameters import Parameters


class Borrowed(NamedTuple):
    step: Tensor  # steps taken, 0-dim
    rates: Tensor  # sum of their rates, 0-dim
    resets: Tensor  # how often the buffers were emptied, 0-dim
    loaded: tuple[Tensor, ...]  # buffers to go on with, where an average has changed them; (): the optimizer's own [d]


@dataclass
class Live:
    """What goes with an optimizer and is no state of a worker: neither is pure."""

    resets: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Those of the last state, which the optimizer has followed."""
    loaded: tuple[Tensor, ...] = ()
    """The buffers that were put into it last."""
    rate: float = math.nan
    """Of the last step."""
    pace: tuple[Tensor, ...] = ()
    """What that has added to a state's ``step`` and ``rates``: tensors, as numbers would be made such each time."""
    names: dict[str, torch.dtype] | None = None
    """The entries of its state that are averaged, and their dtypes; None until they are asked for."""


class Several:
    """Optimizers of one model, each over some of its parameters, as one: a step is one of each, in their order."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self.state = States(self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class Offered:
    """An optimizer that takes the steps where the method lets workers step, and else has its learning rate only.

    For scripts that have an optimizer in any case, as those of a Trainer have, and whose method may be any. ``DanaZero()`` then steps
    at the rate, and by the schedule, of the script's ``SGD(lr=0.1)``; its momentum and weight decay are its own. A method with
    a rate of its own must have the same one.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizers[0] if len(optimizers) == 1 else Several(optimizers)

    def instead(self, method: Method) -> str:
        """What to say where ``method`` takes the steps in the place of the optimizer. ``ValueError`` where that cannot be meant."""
        kind, name = type(method).__name__, type(self.optimizer).__name__
        if isinstance(self.optimizer, Several):
            raise ValueError(
                f"{kind} takes one step on the gradient of the whole model, and this script has {len(self.optimizer.optimizers)} "
                "optimizers: take a method whose workers step themselves, such as LocalSGD"
            )
        inner = method
        while part := next((p for f in fields(inner) if isinstance(p := getattr(inner, f.name), Method)), None):
            inner = part
        group, own, usual = self.optimizer.param_groups[0], rate_of(method), rate_of(type(inner)())
        rate = float(group.get("initial_lr", group["lr"]))
        if not isinstance(own, Schedule) and own not in (usual, rate):
            raise ValueError(
                f"{kind} has the learning rate {own:g}, and {name} has {rate:g}: leave the method's out, which takes that of the "
                "optimizer, or make them equal"
            )
        return f"{kind} takes the steps: of {name} the learning rate counts ({rate:g}), and nothing else"


class States(Mapping[Tensor, Any]):
    """The states of several optimizers, by parameter."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def __getitem__(self, p: Tensor) -> Any:
        for optimizer in self.optimizers:
            if p in optimizer.state:  # which makes an entry for what it is asked for
                return optimizer.state[p]
        raise KeyError(p)

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(optimizer.state for optimizer in self.optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers)

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()


@dataclass(frozen=True, eq=False)
class UserRule(Rule):
    """Steps by a ``torch.optim`` optimizer over a model's `Parameters`; its rate is that of its first group.

    Where it is `direct`, the optimizer steps in the model itself (`take`), outside of the method's handlers, and the rule only
    reads where the model is then: as far as the model has moved since it held a state's parameters, the state moves. So steps
    that the script takes itself, and whatever else it does to the weights, are part of it.

    Buffers are those of its state that are shaped like their parameter (momentum, moments); other entries, such as Adam's step,
    stay when buffers are averaged, and go when they are emptied.
    """

    lr: Any = 1.0
    """Not used: the optimizer has its own."""
    optimizer: Any = None
    """A ``torch.optim.Optimizer`` over the parameters of ``flat``, `Several`, or what has its ``param_groups``, ``state`` and ``step``."""
    flat: Any = None
    """The `Parameters` of the model."""
    steps: Any = None
    """The `OtherSteps` that are to know of its own ones."""
    direct: bool = False
    """Whether the method hands gradients to its rule as they are, and does nothing else with them: they stay in the model then,
    as ``backward()`` has made them, and one of no elements stands for them."""
    evaluates: bool = False
    """Whether it computes the loss itself, by a closure, as LBFGS does."""
    live: Live = field(default_factory=Live)
    """What it remembers from step to step."""

    def init(self, x: Tensor) -> Borrowed:
        return Borrowed(count(x), count(x), count(x), ())

    def take(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer step on the model's gradients; what its step returns."""
        if closure is None and self.evaluates:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} evaluates the loss itself: give step a closure that clears the gradients, "
                "computes the loss, calls backward and returns the loss, as in replica.step(closure)"
            )
        with self.steps.ours():
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def step(self, state: Borrowed, x: Tensor, g: Tensor) -> tuple[Borrowed, Tensor]:
        live, flat = self.live, self.flat
        if self.direct:
            before = flat.held
            moved = flat.read()
            if x is not before and not torch.equal(x, before):  # moved meanwhile, as by a visit
                moved = x + (moved - before)
        else:
            flat.hold(x)
            flat.put_gradient(g)
            self.take()
            moved = flat.read()
        rate = float(self.optimizer.param_groups[0]["lr"])
        if rate != live.rate:
            live.rate, live.pace = rate, (count(x) + 1, count(x) + rate)
        one, more = live.pace
        return Borrowed(state.step + one, state.rates + more, state.resets, ()), moved

    def follow(self, w: Any) -> None:
        """Do to the optimizer's state what an average has done to the buffers in the worker's state ``w``."""
        live, state = self.live, borrowed(w)
        if state.resets is not live.resets:  # else nobody has emptied it, and a GPU need not be waited for
            if int(state.resets) != int(live.resets):
                self.optimizer.state.clear()
            live.resets = state.resets
        if state.loaded is not live.loaded:
            self._load(state.loaded)
            live.loaded = state.loaded

    def buffers(self, state: Borrowed) -> tuple[Tensor, ...]:
        """One for each name of `_names`, which are the same at all workers; 0 where a parameter has no such entry."""
        return state.loaded or tuple(
            torch.cat([self._entry(p, name, dtype) for p in self._parameters()])
            for name, dtype in self._names().items()
        )

    def with_buffers(self, state: Borrowed, buffers: tuple[Tensor, ...]) -> Borrowed:
        return state._replace(loaded=tuple(buffers))

    def restart(self, state: Borrowed) -> Borrowed:
        return state._replace(resets=state.resets + 1, loaded=())

    def _parameters(self) -> list[Tensor]:
        """Those of the model in the optimizer's order; also what was frozen since, so that messages keep their length."""
        ours = set(self.flat.tensors)
        return [p for group in self.optimizer.param_groups for p in group["params"] if p in ours]

    def _entry(self, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        value = dict(_buffers(p, self.optimizer.state.get(p, {}))).get(name)
        if value is None:
            return torch.zeros(local(p).numel(), dtype=dtype, device=local(p).device)
        return local(value).reshape(-1).to(dtype)

    def _load(self, buffers: tuple[Tensor, ...]) -> None:
        """Put averaged buffers into the optimizer's state, where it has such entries."""
        parameters = self._parameters()
        sizes = [local(p).numel() for p in parameters]
        for whole, name in zip(buffers, self._names() if buffers else (), strict=True):
            for p, part in zip(parameters, torch.split(whole, sizes), strict=True):
                value = dict(_buffers(p, self.optimizer.state.get(p, {}))).get(name)
                if value is not None:
                    local(value).copy_(part.view(local(value).shape))

    def _names(self) -> dict[str, torch.dtype]:
        """The entries that parameters have in the optimizer's state and that are shaped like them, in alphabetical order.

        All parameters' together, and for those without a state, as no gradient has come to them yet, what a first step gives
        them: so they follow from the optimizer, not from which minibatches a worker has seen, and workers agree.
        """
        if self.live.names is None:
            found: dict[str, torch.dtype] = {}
            ours = set(self.flat.tensors)
            several = isinstance(self.optimizer, Several)
            for optimizer in self.optimizer.optimizers if several else (self.optimizer,):
                for group in optimizer.param_groups:
                    for p in filter(ours.__contains__, group["params"]):
                        state = optimizer.state.get(p) or _first_state(optimizer, group, p)
                        for name, value in _buffers(p, state):
                            found.setdefault(name, value.dtype)
            self.live.names = dict(sorted(found.items()))
        return self.live.names


def _buffers(p: Tensor, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The entries of a parameter's state that are shaped like it; of a 0-dim parameter, but for the count of steps."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == p.shape and value.layout is torch.strided and name != "step":
            yield name, value


def _first_state(optimizer: Any, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state that a first gradient of 0 gives a parameter like ``p``; none where such a step fails."""
    kind = type(optimizer)
    if kind.__module__.split(".")[:2] != [
        "torch",
        "optim",
    ]:  # others may do more in a step than look at groups and states
        return {}
    twin = object.__new__(kind)
    twin.__dict__.update(optimizer.__dict__, state=defaultdict(dict))
    twin.__dict__.update({name: OrderedDict() for name in vars(twin) if name.endswith("_hooks")})
    for layout in (torch.strided, torch.sparse_coo):
        q = torch.zeros_like(p, requires_grad=True)
        q.grad = torch.zeros_like(q) if layout is torch.strided else torch.zeros_like(q).to_sparse()
        twin.param_groups = [{**group, "params": [q]}]
        with contextlib.suppress(
            RuntimeError, TypeError
        ):  # of one for sparse gradients only, or one that wants a closure
            kind.step(twin)  # of the class: a scheduler has wrapped the optimizer's own
            return dict(twin.state[q])
        twin.state.clear()
    return {}


def _evaluates(optimizer: Any) -> bool:
    """Whether its step cannot be called without a closure, as that of LBFGS."""
    if isinstance(optimizer, Several):
        return any(map(_evaluates, optimizer.optimizers))
    _, *rest = inspect.signature(type(optimizer).step).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in rest)


def borrowed(w: Any) -> Borrowed:
    """The optimizer's part of a worker's state."""
    if isinstance(w, Borrowed):
        return w
    found = (borrowed(part) for part in w if isinstance(part, tuple) and part)
    return next(filter(None, found), None)  # type: ignore[return-value]


def lent(method: Method, optimizer: Any, flat: Parameters, steps: OtherSteps) -> tuple[Method, UserRule]:
    """``method`` with ``optimizer`` in the place of its rule. Raises ``ValueError`` where it has none."""
    ours = set(flat.tensors)
    given = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad or p in ours]
    theirs = set(given)
    if len(theirs) < len(given):
        raise ValueError(f"{len(given) - len(theirs)} parameters are in several optimizers: put each into one")
    if ours != theirs:
        raise ValueError(
            f"the optimizer has {len(theirs)} trainable parameters, of which {len(ours & theirs)} are the model's "
            f"{len(ours)}: make it of model.parameters()"
        )
    if with_rule(method, UserRule()) is None:
        raise ValueError(
            f"{type(method).__name__} has no local rule for an optimizer to take the place of: leave the optimizer out, "
            "or take a method such as LocalSGD, DiLoCo, SlowMo or SGP"
        )
    rule = UserRule(
        optimizer=optimizer, flat=flat, steps=steps, direct=_hands_over(method), evaluates=_evaluates(optimizer)
    )
    if rule.evaluates and not rule.direct:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, and {type(method).__name__} averages one "
            "gradient before each: take a method whose workers step by themselves, such as LocalSGD(period=1)"
        )
    lent = with_rule(method, rule)
    assert lent is not None
    return lent, rule


@dataclass(frozen=True, eq=False)
class _Probe(UserRule):
    """Takes note of the gradients that it is given."""

    given: list[Tensor] = field(default_factory=list)

    def step(self, state: Borrowed, x: Tensor, g: Tensor) -> tuple[Borrowed, Tensor]:
        self.given.append(g)
        return state, x


def _hands_over(method: Method) -> bool:
    """Whether ``local`` hands the gradient to the method's rule as it is, and keeps it nowhere: tried on one number."""
    probe, x = _Probe(), torch.zeros(1)
    probed = with_rule(method, probe)
    assert probed is not None
    method = probed
    g = torch.ones(1)
    start = ParameterServer.start(method, x).join(0) if isinstance(method, ServerMethod) else x
    w = method.local(method.init(start), g)
    return [given is g for given in probe.given] == [True] and not any(t is g for t in leaves(w))


class Lending:
    """Puts what the script steps by into the method of each life of a worker: ``optimizer``, or else the rate that it sets."""

    def __init__(self, optimizer: Any, flat: Parameters, others: OtherSteps) -> None:
        self.offered = optimizer if isinstance(optimizer, Offered) else None
        self.optimizer, self.flat, self.others = None if self.offered else optimizer, flat, others
        self.rule: UserRule | None = None
        """The optimizer as the rule of this life."""
        self.rate = math.nan
        """The rate that the script has set, or the method's own at its first step."""
        self._dial: Dial | None = None  # None: the method's rate is a schedule, or it has none

    def __call__(self, method: Method) -> Method:
        if self.offered is not None:
            if with_rule(method, UserRule()) is not None:
                self.optimizer = self.offered.optimizer
            elif math.isnan(self.rate):
                WORKER.warning(self.offered.instead(method))
        if self.optimizer is not None:
            method, self.rule = lent(method, self.optimizer, self.flat, self.others)
            return method
        if math.isnan(self.rate) and (lr := rate_of(method)) is not None:
            self.rate = float(lr(0)) if isinstance(lr, Schedule) else float(lr)
            self._dial = dial_of(method)
        return method if self._dial is None else with_rate(method, self._dial)

    def set_rate(self, groups: list[dict[str, Any]], method: Method) -> bool:
        """The script wants the rate of ``groups`` from its next gradient on; whether that is another one. ``ValueError`` where
        ``method`` cannot have it."""
        lr = float(groups[0]["lr"])
        if len(groups) > 1 and len(rates := sorted({float(group["lr"]) for group in groups})) > 1:
            raise ValueError(
                f"{type(method).__name__} steps all parameters at one learning rate, and the groups of param_groups have {rates}: "
                "give them one, or take a method whose workers step themselves, such as LocalSGD"
            )
        if lr == self.rate:
            return False
        if self._dial is None:
            raise ValueError(
                f"lr = {lr:g} in param_groups: the rate of {type(method).__name__} is a schedule of its own; give the method a "
                "number, or leave the rate to it"
            )
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr = {lr} in param_groups: must be a finite number, at least 0")
        self._dial.value = self.rate = lr
        return True

    @property
    def holder(self) -> Any:
        """The script's own optimizer, whose groups and state are the replica's; None where it has none."""
        return self.optimizer if self.offered is None else self.offered.optimizer

    @property
    def own_steps(self) -> bool:
        """Whether the optimizer is an object of the script's own, whose step may be no more than that others have stepped."""
        return self.optimizer is not None and not isinstance(self.optimizer, torch.optim.Optimizer | Several)

    @property
    def direct(self) -> UserRule | None:
        """The rule, where the optimizer steps in the model itself."""
        return self.rule if self.rule is not None and self.rule.direct else None


def with_rule(method: Method, rule: Rule) -> Method | None:
    """``method`` with ``rule`` in the place of the one that workers step by; None where they have none."""
    for f in fields(method) if not isinstance(method, GradientServer) else ():  # whose rule would be the server's
        part = getattr(method, f.name)
        if isinstance(part, Rule):
            return replace(method, **{f.name: rule})
        if isinstance(part, Method):
            inner = with_rule(part, rule)
            return None if inner is None else replace(method, **{f.name: inner})
    return None


def stepped_beside(stepped: torch.optim.Optimizer, given: Any, method: Method) -> str:
    """What to say of an optimizer that has stepped the parameters of a replica, which was ``given`` one, several, or none."""
    name = type(stepped).__name__
    if stepped is given or (isinstance(given, Several) and stepped in given.optimizers):
        cure = "replica.step() calls it: leave optimizer.step() out, or call replica.exchange() after it in place of replica.step()"
    elif given is not None:
        cure = f"the replica has the {type(given).__name__} that it was given: make one optimizer of all, and leave this step out"
    elif with_rule(method, UserRule()) is None:
        cure = f"{type(method).__name__} takes the steps: leave optimizer.step() out"
    else:
        cure = f"{type(method).__name__} steps by a rule of its own: give Replica optimizer=..., and leave optimizer.step() out"
    return f"{name}.step() was called beside replica.step(), so that each gradient would be applied twice; {cure}"


def no_own_steps(method: Method, given: bool) -> str:
    """What to say where a method cannot go on from steps of the script's own; whether the replica was ``given`` an optimizer."""
    kind = type(method).__name__
    if given:
        return (
            f"{kind} averages gradients, not models, so it needs step(): for steps of your own take LocalSGD(period=1)"
        )
    if with_rule(method, UserRule()) is None:
        return f"{kind} takes the steps, so it needs the gradients, by step(): for steps of your own take a method such as LocalSGD"
    return f"{kind} steps by a rule of its own here: for steps of your own make the Replica with optimizer=..."
