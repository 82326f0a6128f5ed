"""One worker of a real run in the user's own training loop: `Replica` takes the place of the optimizer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..core.gossip import GossipMethod
from ..core.method import Method, ServerMethod
from ..tasks.flat import Flat, flatten, local
from .exit import Member
from .host import OtherKind
from .layout import layout_of
from .optimizer import Lending
from .passes import shard
from .peer import Peer, Solitary
from .place import Place
from .streams import seed_streams
from .team import Team, Together
from .worker import Alone, Driver, Parse, Remote, Worker

T = TypeVar("T")
IN_PLACE = torch.empty(0)
"""What a worker is given where its gradient stays in the model."""


class Replica:
    """A model that trains together with others, each at its own pace.

        replica = ob.Replica(model, ob.methods.DanaZero(lr=0.05))
        for x, y in replica.shard(loader):
            loss_fn(model(x), y).backward()
            replica.step()

    Joins the run that ``offbeat launch`` (or ``OFFBEAT_SERVER``) describes; started by itself, the script is a run of one
    worker. From then on ``model`` holds the parameters at which the run wants this worker's next gradient.

    ``model`` is any module with trainable parameters of one dtype and device; move and cast it before. Its buffers
    (running statistics) stay this worker's own. ``method`` may be any; None: the launcher names it. A broken link
    is dialled again for up to ``OFFBEAT_PATIENCE`` seconds. SIGTERM makes the worker finish its step, leave in good order
    and exit; see `offbeat.runtime.exit` for what happens where no step comes, and `leave` for the end of a script. A handler
    for SIGTERM that the script has set before stays in place, and nothing else is done.

    In a run of several, each worker has random numbers of its own from here on: torch (all devices), ``random`` and numpy are seeded
    by what the script's own seed would have given next, the run's seed, the worker's number and the steps that it has taken. So a
    script that has set a seed before, and draws its minibatches itself, has no two workers draw the same, and one that is started
    again does not repeat itself. Draw from a generator of your own with ``replica.id`` in its seed.

    Clip, accumulate and scale gradients as with an optimizer: gradients are those of ``model.parameters()`` until `step`,
    and ``scaler.step(replica)`` works. A step that the scaler would skip is taken with a gradient of 0: nobody waits for
    an exchange that does not come, and replicas do not drift apart.

    Raises ``ValueError`` where the model cannot be flattened, or the run refuses it (another model, another method);
    `LinkLost` where nobody answers; ``PermissionError`` for a wrong token.
    """

    _step_supports_amp_scaling = True  # GradScaler always calls `step`; for that long it sets these two:
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        *,
        optimizer: Optimizer | None = None,
        group: ProcessGroup | None = None,
        place: Place | None = None,
    ) -> None:
        """``optimizer`` takes the local steps in the place of the method's rule. ``group`` are the ranks that together are
        this worker, with the model in `DistributedDataParallel` or after ``fully_shard``. ``place`` is where the run is
        (None: what the environment says).
        """
        from ..names import read  # which knows everybody, so not at import

        if method is not None and not isinstance(method, Method):
            raise TypeError(f"method = {method!r}: give a method such as DanaZero(lr=0.05)")
        if group is None and isinstance(model, DistributedDataParallel):
            raise ValueError(
                "the model is in DistributedDataParallel: name the process group of its ranks, as in group=dist.group.WORLD, "
                "if they are to be one worker; if each is to be one, give and train the module inside"
            )
        place = place or Place.read(launchers=group is None)
        if place.method and method is not None and repr(read(place.method)) != repr(method):
            raise ValueError(
                f"the script says {method!r} and the launcher says {place.method}: name the method in one place"
            )
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self.model, self.flat = model, flatten(model)
        self.team = Team(group, isinstance(self.flat, Flat))
        if group is None and not self.team.whole:
            raise ValueError("the model is sharded: name the process group of its ranks, as in group=dist.group.WORLD")
        method = method if method is not None or not place.method else read(place.method)
        x0 = self.flat.read()
        self._lending = Lending(optimizer, self.flat)
        self._member = Member(_say)
        try:
            self.worker = enter(
                place, x0, method, {"layout": layout_of(model)}, read, _say, self._member.told, self._lending, self.team
            )
            if place.servers:
                terms = self.worker.terms
                seed_streams(terms.seed, terms.worker, terms.step, self.team.rank)
            self._life = 0  # of the worker, whose parameters the model holds
            self._shown = False  # whether the model holds the shipped parameters instead
            self._take()
        except BaseException:
            self._member.forget()
            raise
        self._passes = 0
        self._member.joined(self.worker, self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters as an optimizer names them, so that ``scaler.unscale_(replica)`` works."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    @property
    def id(self) -> int:
        """The number of this worker in the run."""
        return self.worker.terms.worker

    @property
    def workers(self) -> int:
        """How many workers the run was launched with."""
        return self.worker.terms.workers

    def step(self, loss: Tensor | float | None = None) -> None:
        """Hand in the gradients that the parameters have, and go on from the next parameters, with gradients 0.

        ``loss`` is only for the run's table and trace. Raises `Diverged` where the server refuses what is not finite.
        """
        self._member.check()
        g, scale = self._gradient(), getattr(self, "grad_scale", None)
        skip = float(getattr(self, "found_inf", 0.0)) > 0
        if skip:
            g.zero_()
        elif scale is not None:
            for part in [g] if g.numel() else [local(p.grad) for p in self.flat.parameters if p.grad is not None]:
                part.div_(scale.to(part))
        rule = self._lending.rule
        if rule is not None:
            rule.live.skip = skip
        number = float("nan") if loss is None else float(torch.as_tensor(loss).detach())
        with self._member.turn():
            self.worker.step(g, number)
            self._member.stepped()
            self._take()
            if self.team.any(self._member.told()) and self.worker.free:
                _say(f"worker {self.id} leaves, as SIGTERM asks")
                self.leave(done=False)
                raise SystemExit(0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as an optimizer does; `step` has done so already."""
        if self._direct:
            self.flat.drop_grad()
        else:
            self.flat.zero_grad()

    def shard(self, loader: Iterable[T]) -> Iterator[T]:
        """One pass over ``loader``'s data, shared with all workers: each minibatch goes to the one who is free.

        Of a `DataLoader` with a map-style data set, a pass is cut into the loader's own minibatches, in an order that
        follows from the run's seed. The server hands them out, so fast workers get more, those of a worker that died go
        to another, and a worker that was restarted goes on where the run is: passes that are over yield nothing. Other
        iterables are dealt out by turns: worker i of n takes items i, i + n, ... The ranks of a group share each minibatch:
        rank r of G gets its examples r, r + G, ...

        After the pass the model holds the parameters that would be shipped now, to evaluate; the next pass puts this
        worker's own back.
        """
        return shard(self, loader)

    def leave(self, done: bool = True) -> None:
        """Leave the run in good order; the model keeps what it holds. ``done`` says that this worker's work is: who is not done is
        waited for, as another process may go on in its place.

        A script that ends without having left leaves then, and is done where no error ended it and its loops have: its last pass
        over `shard` was not broken off, or it has made none and taken steps.
        """
        self._member.leave(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.leave()
        else:
            self._member.end(error)

    @property
    def _direct(self) -> bool:
        """Whether gradients go from the model to the user's optimizer, and nowhere else."""
        return self._lending.rule is not None and self._lending.rule.direct

    def _gradient(self) -> Tensor:
        """What the worker is given: the gradient [d], or nothing where the user's optimizer finds it in the model."""
        if self._direct:
            self.flat.complete()
            return IN_PLACE
        return self.flat.gradient() if self.worker.keeps and self._lending.rule is None else self.flat.gather()

    def _own(self) -> None:
        """Put the worker's parameters into the model, where it holds others."""
        if self._shown or self._life != self.worker.life:
            self._take()

    def _take(self) -> None:
        room = self.worker.room() if self._life != self.worker.life else None
        if room is not None and isinstance(self.flat, Flat):
            self.flat.collect_in(room)
        self.flat.hold(self.worker.x)
        self.zero_grad()
        self._shown, self._life = False, self.worker.life


def enter(
    place: Place,
    x0: Tensor,
    method: Method | None,
    hello: dict[str, Any],
    parse: Parse,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    lend: Callable[[Method], Method] = lambda method: method,
    team: Team | None = None,
) -> Driver:
    """Join the run at ``place`` with a model at ``x0`` [d], or be one alone where there is none."""
    if not place.servers:
        if method is None:
            raise ValueError("method = None: give one, or start the script with `offbeat launch --method NAME`")
        if not isinstance(method, ServerMethod):
            return Solitary(lend(method), x0, say)
        return Worker(Alone(method, x0), say, lend)
    team = team or Team()
    if team.size > 1:
        if len(place.servers) != team.size:
            raise ValueError(
                f"a worker of {team.size} ranks, and {len(place.servers)} servers in OFFBEAT_SERVER: each rank needs one; "
                f"start the script with offbeat launch --ranks {team.size}"
            )
        if method is None:
            raise ValueError(
                "method = None: a worker of several ranks must know it; give one, or --method to the launcher"
            )
        if team.whole and isinstance(method, GossipMethod):
            raise ValueError(
                f"{method!r}: gossip does not come to all ranks at once, so they cannot each have the whole model; shard it "
                "with fully_shard, or take a method with a server or with averages"
            )
        place = replace(place, servers=(place.servers[team.rank],))
    place.host()
    hello = {**hello, "method": "" if method is None else repr(method)}
    if method is None or isinstance(method, ServerMethod):
        if method is not None:
            lend(method)  # which says why not, before anybody is dialled
        shard = (team.rank, team.size) if team.size > 1 else None
        remote = Remote(place, x0[team.part(len(x0))], hello, parse, shard)
        remote.stopped, remote.say = stopped, say
        if team.size > 1:
            return Worker(Together(remote, team, len(x0)), say, lend)
        with contextlib.suppress(OtherKind):  # it names a method whose workers are peers
            return Worker(remote, say, lend)
    return Peer(place, x0, hello, parse, say, lend, stopped, team)


def _say(text: str) -> None:
    print(f"offbeat: {text}", file=sys.stderr, flush=True)
