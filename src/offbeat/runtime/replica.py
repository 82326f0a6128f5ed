"""One worker of a real run in the user's own training loop: `Replica` takes the place of the optimizer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.method import Method
from ..log import WORKER, seen
from .buffers import RULES, Buffers
from .edits import OtherSteps, Roster, cannot_follow
from .entry import enter
from .exit import Member
from .layout import layout_of, plain_name
from .models import Model, called, one_module
from .optimizer import Lending, Offered, Several, no_own_steps, stepped_beside
from .parameters import Parameters
from .passes import Passes, Shard
from .place import Place
from .schedulers import Count, RunScheduler
from .shared_state import Shared
from .statistics import Statistics
from .streams import seed_streams
from .team import Team
from .worker import SKIPS, Driver

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which a torch without torch.distributed lacks

T = TypeVar("T")
S = TypeVar("S")
Loss = Tensor | float
Closure = Callable[[], Loss]
IN_PLACE = torch.empty(0)
"""What a worker is given where its gradient stays in the model."""


class Replica(Optimizer):
    """A model that trains together with others, each at its own pace.

        replica = ob.Replica(model, ob.methods.DanaZero(lr=0.05))
        for x, y in replica.shard(loader):
            loss_fn(model(x), y).backward()
            replica.step()

    Joins the run that ``offbeat launch`` (or ``OFFBEAT_SERVER``) describes; started by itself, the script is a run of one
    worker. From then on ``model`` holds the parameters at which the run wants this worker's next gradient.

    ``model`` is any module with trainable parameters of one dtype and device, or a dictionary or list of modules, such as the two of
    a GAN, that are one model; move and cast it before. Its frozen parameters and
    buffers are made those of the first worker; buffers that change in training (running statistics) are this worker's own from then on. ``method`` may be any; None: the launcher names it. A broken link
    is dialled again for up to ``OFFBEAT_PATIENCE`` seconds. SIGTERM makes the worker finish its step, leave in good order
    and exit; see `offbeat.runtime.exit` for what happens where no step comes, and `leave` for the end of a script. A handler
    for SIGTERM that the script has set before stays in place, and nothing else is done.

    In a run of several, each worker has random numbers of its own from here on: torch (all devices), ``random`` and numpy are seeded
    by what the script's own seed would have given next, the run's seed, the worker's number and the steps that it has taken. So a
    script that has set a seed before, and draws its minibatches itself, has no two workers draw the same, and one that is started
    again does not repeat itself. Draw from a generator of your own with ``replica.id`` in its seed.

    It is a ``torch.optim.Optimizer``, so clip, accumulate and scale gradients as with any: gradients are those of
    ``model.parameters()`` until `step`, and ``scaler.step(replica)`` works. A step that the scaler would skip is taken with a
    gradient of 0: nobody waits for an exchange that does not come, and replicas do not drift apart.

    ``param_groups[0]["lr"]`` is the rate of this worker's gradients, for the schedulers of torch: one of a method's rule at the worker,
    or one that goes along with the gradient to a server that steps by it. Each worker's script sets its own, by the steps or
    passes that it has taken itself. The rate of a method that was given a schedule is refused. With ``optimizer``, groups and
    state are that one's.

    Raises ``ValueError`` where the model cannot be flattened, or the run refuses it (another model, another method);
    `LinkLost` where nobody answers; ``PermissionError`` for a wrong token.
    """

    worker: Driver
    _step_supports_amp_scaling = True  # GradScaler always calls `step`; for that long it sets these two:
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self,
        model: Model,
        method: Method | None = None,
        *,
        default: Method | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | Offered | None = None,
        group: ProcessGroup | None = None,
        place: Place | None = None,
        buffers: Literal["fresh", "average", "first", "own"] = "fresh",
    ) -> None:
        """``default`` is the method where neither launcher nor run has another, in the place of ``method``, which must be theirs.
        ``optimizer`` takes the local steps in the place of the method's rule: one of ``torch.optim``, several in a list that each have
        some of the parameters (the first one's rate is that which the method counts with), or an object of your own with
        ``param_groups``, ``state`` and ``step``. One that is `Offered` does so where the method lets workers step, and else has its
        learning rate only. ``group`` are the ranks that together are
        this worker, with the model in `DistributedDataParallel` or after ``fully_shard``. ``place`` is where the run is
        (None: what the environment says).

        ``buffers`` says what becomes of the model's buffers, such as running statistics. Those of the first worker go to all that
        join; each worker's change in training; and after each pass of `shard` they are, "fresh": the running statistics of batch
        norm are taken anew at the shipped parameters, over this worker's last minibatches; "average": the mean of all workers'
        as each last had them (of floating point; others stay); "first": those of the worker with the lowest number; "own": left
        alone, from the beginning.
        """
        from ..names import read  # which knows everybody, so not at import

        for name, value in (("method", method), ("default", default)):
            if value is not None and not isinstance(value, Method):
                raise TypeError(f"{name} = {value!r}: give a method such as DanaZero(lr=0.05)")
        if method is not None and default is not None:
            raise ValueError(
                f"method = {method!r}, default = {default!r}: give one, or the default if the launcher may name another"
            )
        module = one_module(model, ranks=group is not None)
        if buffers not in ("fresh", *RULES, "own"):
            raise ValueError(f'buffers = {buffers!r}: must be "fresh", "average", "first" or "own"')
        place = place or Place.read(launchers=group is None)
        if place.method and method is not None and repr(read(place.method)) != repr(method):
            raise ValueError(
                f"the script says {method!r} and the launcher says {place.method}: name the method in one place, or give it as "
                "Replica(model, default=...)"
            )
        self.model, self.flat, self._place = module, Parameters(module), place
        self.team = Team(group, self.flat.whole)
        if group is None and not self.team.whole:
            raise ValueError("the model is sharded: name the process group of its ranks, as in group=dist.group.WORLD")
        me = (place.servers, place.worker) if place.servers and place.worker is not None else None
        if me is not None and (other := _LIVE.get(me)) is not None and not other.worker.left:
            raise RuntimeError(
                f"this process is worker {place.worker} of the run already, by another Replica, and one worker has one model. Make "
                "one module of both, such as nn.ModuleList([a, b]), and one Replica of it; or leave() the first one before"
            )
        if method is None and place.method:
            method = read(place.method)
        if method is None and (not place.servers or self.team.size > 1):
            method = default
        x0 = self.flat.held
        self._others = OtherSteps(self.flat.tensors)
        self._roster = Roster(module, self.flat.tensors) if self.flat.whole else None
        own = Several(optimizer) if isinstance(optimizer, Sequence) else optimizer
        self._lending = Lending(own, self.flat, self._others)
        self._statistics = [Statistics(part, WORKER) for part in called(module)] if buffers == "fresh" else []
        shared = Shared(module, buffers != "own", self.team.whole) if place.servers else None
        if buffers in RULES and not self.team.whole:
            raise ValueError(f'buffers = {buffers!r}: of a sharded model no rank has the whole: take "fresh" or "own"')
        self._buffers = Buffers(shared, buffers) if shared is not None and buffers in RULES else None
        seen()
        self._member = Member(WORKER)
        try:
            self.worker = enter(
                place,
                x0,
                method,
                {"layout": layout_of(module)} | ({} if default is None else {"default": repr(default)}),
                read,
                WORKER,
                self._member.told,
                self._lending,
                self.team,
                shared,
            )
            if shared is not None:
                shared.joined(self.team)
                terms = self.worker.terms
                seed_streams(terms.seed, terms.worker, terms.step, self.team.rank)
            self._memory: Tensor | None = None  # where gradients are put together, if they may be used up there
            self._life = 0  # of the worker, whose parameters the model holds
            self._fresh = True  # whether it has taken no step
            self._ended = False  # whether a pass has ended since the last step
            self._shown = False  # whether the model holds the shipped parameters instead
            self._take()
        except BaseException:
            self._member.forget()
            raise
        super().__init__(self.flat.tensors, {"lr": self._lending.rate})
        self._share_groups()
        self.passes = Passes(self)
        self.worker.skips = SKIPS
        self._member.joined(self.worker, self)
        if me is not None:
            _LIVE[me] = self

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with ``ValueError`` once the replica is made: the model's parameters are those that it had then."""
        if self.param_groups:
            raise ValueError(
                "a replica has the parameters that its model had when it was made: give Replica optimizer=... for groups"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the script's own optimizer; without one the rate alone, as the rest is the run's."""
        own = self._lending.holder
        return super().state_dict() if own is None else own.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` has given."""
        own = self._lending.holder
        if own is None:
            super().load_state_dict(state_dict)
        else:
            own.load_state_dict(state_dict)
            self._share_groups()

    @property
    def id(self) -> int:
        """The number of this worker in the run."""
        return self.worker.terms.worker

    @property
    def workers(self) -> int:
        """How many workers the run was launched with."""
        return self.worker.terms.workers

    @property
    def main(self) -> bool:
        """Whether this is the one process of the run that prints, evaluates and saves for all: the first rank of worker 0."""
        return self.id == 0 and self.team.rank == 0

    def model_state(self) -> dict[str, Any]:
        """The ``state_dict`` of the model that would be shipped now, as far as this worker knows it: of a server the master's point,
        else this worker's own model. A copy, by the names of the module without wrappers, which loads it strictly.

        Buffers, such as running statistics, are this worker's. The model itself stays where it is. Raises ``ValueError`` for a
        model of which each rank has a part.
        """
        if not self.flat.whole:
            raise ValueError("model_state() of a sharded model: no rank has the whole; model.pt has, after the run")
        if not self._shown:
            self._notice()
        x = self.flat.read() if self.worker.left else self.worker.master()
        parts = {id(p): part for p, part in zip(self.flat.tensors, self.flat.parts(x), strict=True)}
        state = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            name = key if key.endswith("_extra_state") else plain_name(self.model, key)
            state[name] = parts.get(id(value), value)
        return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in state.items()}

    def step(self, loss: Loss | Closure | None = None, *, closure: Closure | None = None) -> Loss | None:  # type: ignore[override]
        """Hand in the gradients that the parameters have, and go on from the next parameters, without gradients.

        ``loss`` is only for the run's table and trace. A ``closure``, given as such or in its place, clears the gradients,
        computes the loss, calls ``backward()`` and returns the loss: the user's optimizer gets it, which may call it several
        times (LBFGS); else it is called once. Returns its loss.

        Weights that the script has set since the last step (a state that was loaded, clipping, pruning) are taken over by
        methods whose workers step themselves. Raises ``RuntimeError`` where they cannot be, where another optimizer has
        stepped them, and where the model has trainable parameters that were none when the replica was made.

        A gradient that is not finite is skipped, as `GradScaler` does, and said with its minibatch; `Diverged` after several in a
        row.
        """
        if callable(loss):
            loss, closure = None, loss
        lending, method = self._lending, self.worker.terms.method
        self._share_groups()
        if (stepped := self._check()) is not None and not lending.own_steps:
            raise RuntimeError(stepped_beside(stepped, lending.optimizer, method))
        skip, scale = float(getattr(self, "found_inf", 0.0)) > 0, getattr(self, "grad_scale", None)
        if (rule := lending.direct) is not None:
            if self.worker.request.free and not lending.own_steps:
                self._notice()  # in the middle of a block the rule sees where the model is
            if scale is not None and not skip:
                self.flat.scale_gradients(scale)
            if not skip:
                taken = rule.take(closure)
                loss = loss if closure is None else taken
            g = IN_PLACE
        else:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._notice()
            g = self.flat.gradient(out=self._memory)
            if skip:
                g.zero_()
            elif scale is not None:
                g.div_(scale.to(g))
        self._advance(g, loss)
        return None if closure is None else loss

    def exchange(self, loss: Loss | None = None) -> None:
        """Go on from where the script's own steps have brought the model: what `step` does beside the step of the optimizer.

        For two optimizers that take turns, or a step that is no ``optimizer.step()``. The replica is made with ``optimizer=``,
        whose rate and state are what the method goes by. ``loss`` as for `step`. Raises ``RuntimeError`` as `step` does, and
        for a method that needs the gradients.
        """
        self._check()
        if self._lending.direct is None:
            raise RuntimeError(no_own_steps(self.worker.terms.method, self._lending.rule is not None))
        self._advance(IN_PLACE, loss)

    def _advance(self, g: Tensor, loss: Loss | None) -> None:
        """Hand the worker the gradient ``g`` [d], and take the next parameters."""
        number = float("nan") if loss is None else float(torch.as_tensor(loss).detach())
        self._fresh = False
        with self._member.turn():
            self.worker.step(g, number)
            self._member.stepped()
            ended, self._ended = self._ended, False
            self._take()
            if (
                ended and not self.passes.running
            ):  # the pass ended before its last step, as where something reads ahead of the loop
                self._show()
            if self.team.any(self._member.told()) and self.worker.free:
                WORKER.info(f"worker {self.id} leaves, as SIGTERM asks")
                self.leave(done=False)
                raise SystemExit(0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as an optimizer does; `step` has done so already."""
        self.flat.zero_grad(set_to_none)

    @overload
    def shard(
        self, loader: Iterable[T], epoch: int | None = None, *, accumulate: None = None, skip: int = 0
    ) -> Shard[T]: ...

    @overload
    def shard(
        self, loader: Iterable[T], epoch: int | None = None, *, accumulate: int, skip: int = 0
    ) -> Shard[list[T]]: ...

    def shard(
        self, loader: Iterable[Any], epoch: int | None = None, *, accumulate: int | None = None, skip: int = 0
    ) -> Shard[Any]:
        """``loader``'s minibatches, shared with all workers: each goes to the one that is free. Going over the result is one pass
        over the data, going over it again is the next.

        *A `DataLoader` with a map-style data set*: a pass consists of the loader's own minibatches, made as the loader makes
        them, in an order that follows from the run's seed and the pass's number; the global random numbers of torch, Python
        and numpy, and generators that loader and samplers have, are seeded while it is listed. Fast workers get more
        minibatches, and those of a worker that died go to another. All workers need the same data and ``batch_size``: one that
        differs is refused. The ranks of a group share each minibatch: rank r of G gets its examples r, r + G, ...

        *A sequence or a map-style data set* is shared in the same way, item by item.

        *Any other iterable* is dealt out by turns: worker i of n takes items i, i + n, ... A worker that is started again begins
        it anew.

        Passes are numbered by how many this script has begun before, as all workers run the same one. A script that does not
        begin with the first epoch, as it goes on from its own checkpoint, says ``epoch`` [0, 1, ...]; so does `epochs`. One that
        goes on in the middle of a pass says how many minibatches to ``skip``; a run that is further goes on where it is.

        With ``accumulate`` each item is a list of that many minibatches (fewer in the last one of a pass), for one step on all of
        them. Lists are dealt out whole, so that no worker's part of a pass ends within a step; lengths, ``skip`` and positions
        count them.
        ``break`` ends a pass for this worker only, and the next pass is a whole one. Each worker that is there gets at least
        one minibatch of a pass with enough of them. One that comes to a pass that is over, as it came late or was started
        again, gets one of the pass where the run is, so that the body of its loop has run; nothing where there is none.

        After the pass the model holds the parameters that would be shipped now, to evaluate; the next pass puts this
        worker's own back.

        Raises ``ValueError`` for what cannot be shared, with what to write instead.
        """
        return self.passes.shard(loader, epoch, accumulate, skip)

    def epochs(self, *bounds: int, scheduler: Any = None) -> Iterator[int]:
        """The epochs from where the run is: ``for epoch in replica.epochs(20)``, or ``epochs(start, 20)`` as of ``range``.

        Passes of `shard` inside of the loop, one or several, belong to its epoch. A worker that was started again, or comes late,
        so begins where the others are; ``scheduler``, one of torch that is stepped once an epoch, is brought there as well.
        """
        return self.passes.epochs(range(*bounds), scheduler)

    def steps(self, count: int) -> Shard[int]:
        """The numbers 0, ..., ``count`` - 1, each to one worker: for scripts that make their minibatches themselves, as of random
        pieces of a text or of a game. All workers together take ``count`` steps, whoever is slow or is started again.
        """
        return self.shard(range(count))

    def stop(self) -> None:
        """End the run for all workers, as where `main` finds that the model gets no better: nothing more is dealt out, passes of `shard`
        come to their end, and loops over `epochs` too.
        """
        self.passes.ask({"stop": True})

    @contextlib.contextmanager
    def shipped(self) -> Iterator[None]:
        """Inside of ``with``, the model holds the parameters that would be shipped now, to evaluate or save them in the middle of a
        pass; afterwards, this worker's own, and the gradients that it had.
        """
        if self.worker.left or self._shown:
            yield
            return
        gradients = [p.grad for p in self.flat.tensors]
        with self._member.turn():
            self._show()
        try:
            yield
        finally:
            self._own()
            for p, gradient in zip(self.flat.tensors, gradients, strict=True):
                p.grad = gradient

    def schedule(self, scheduler: S) -> S:
        """``scheduler``, of ``torch.optim.lr_scheduler``, such that its ``step()`` brings it to where the run is.

        For one that counts a plain script's steps, as ``OneCycleLR`` does, or its epochs: called within a pass of `shard` it goes by
        minibatches, and after one by passes. All workers together then go through the schedule once, and one that is started
        again goes on at the run's place.
        """
        return cast(S, RunScheduler(scheduler, Count(scheduler, self.passes)))

    def leave(self, done: bool = True) -> None:
        """Leave the run in good order, with the weights that the model has, and keeps. ``done`` says that this worker's work is: who is not done is
        waited for, as another process may go on in its place.

        A script that ends without having left leaves then, and is done where no error ended it and its loops have: its last pass
        over `shard` was not broken off, or it has made none and taken steps.
        """
        if done and not self.worker.left:
            with contextlib.suppress(
                RuntimeError
            ):  # where the method cannot take its weights over, they are the script's own
                self._notice()
        self._member.leave(done)
        for statistics in self._statistics:
            statistics.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.leave()
        else:
            self._member.end(error)

    def _share_groups(self) -> None:
        """`param_groups` and `state` are those of the script's own optimizer; without one the rate in them goes to the method."""
        own, method = self._lending.holder, self.worker.terms.method
        if own is not None:
            self.param_groups, self.state = own.param_groups, own.state
            self.defaults = getattr(own, "defaults", {})
        if self._lending.optimizer is None and self._lending.set_rate(self.param_groups, method):
            self.worker.rate = self._lending.rate

    def _check(self) -> Optimizer | None:
        """Raise where a step cannot be taken; the optimizer that has stepped beside this replica, if one has."""
        self._member.check()
        if self._roster is not None:
            self._roster.check()
        return self._others.take()

    def _notice(self) -> None:
        """Take over what the script has written into the parameters. Raises ``RuntimeError`` where the method cannot."""
        names = self.flat.touched()
        if names:
            held = self.flat.held
            with self._member.turn():
                could = self.worker.moved(self.flat.read(), None if self._shown else held)
            if not could:
                self.flat.held = held  # so that the next step says it again
                raise RuntimeError(cannot_follow(names, self.worker.terms.method))

    def _show(self) -> None:
        """Put the parameters that would be shipped now into the model, and running statistics that fit."""
        self._notice()
        x = self.worker.master()
        moved = self.team.any(not torch.equal(x, self.worker.x))
        self.flat.write(x)
        self._shown = True
        for statistics in self._statistics if moved else ():
            statistics.take(lambda count: -self.team.highest(-count))
        if self._buffers is not None:
            self._buffers.meet(self._place, self.id, self.team)

    def _start(self) -> None:
        """Where the script has set weights before its first step, as from a checkpoint, the run begins there if it can."""
        if not (self._fresh and self.flat.touched()):
            return
        with self._member.turn():
            held, x = self.flat.held, self.flat.read()
            if not self.worker.begin_at(x):
                self.flat.held = held
                self._notice()
                return
            if not torch.equal(self.worker.master(), x):
                WORKER.warning(
                    f"the weights that worker {self.id}'s script has loaded are put aside: the run has begun, and its are taken"
                )
            self._take()

    def _own(self) -> None:
        """Put the worker's parameters into the model, where it holds others."""
        if self._shown and self._life == self.worker.life:
            self._notice()
        if self._shown or self._life != self.worker.life:
            self._take()

    def _take(self) -> None:
        if self._life != self.worker.life and not self.worker.keeps:
            room = self.worker.room()
            self._memory = torch.empty_like(self.worker.x) if room is None else room
        if self._lending.rule is not None:
            self._lending.rule.follow(self.worker.node.state)
        self.flat.hold(self.worker.x)
        self.zero_grad()
        self._shown, self._life = False, self.worker.life


_LIVE: weakref.WeakValueDictionary[tuple[tuple[str, ...], int | None], Replica] = weakref.WeakValueDictionary()
"""The replica that is a worker of a run in this process, by the run's servers and the worker's number."""
