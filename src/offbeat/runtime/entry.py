"""How a process comes into a run: as a worker of a server, as a peer, or alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.gossip import GossipMethod
from ..core.method import Method, ServerMethod
from .host import OtherKind
from .peer import Peer
from .place import Place
from .shared_state import Shared
from .solitary import Solitary
from .team import Team, Together
from .worker import Alone, Driver, Parse, Remote, Worker


def enter(
    place: Place,
    x0: Tensor,
    method: Method | None,
    hello: dict[str, Any],
    parse: Parse,
    log: logging.Logger,
    stopped: Callable[[], bool] = lambda: False,
    lend: Callable[[Method], Method] = lambda method: method,
    team: Team | None = None,
    shared: Shared | None = None,
) -> Driver:
    """Join the run at ``place`` with a model at ``x0`` [d], or be one alone where there is none."""
    if not place.servers:
        if method is None:
            raise ValueError("method = None: give one, or start the script with `offbeat launch --method NAME`")
        if not isinstance(method, ServerMethod):
            return Solitary(lend(method), x0, log)
        return Worker(Alone(method, x0), log, lend)
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
    mine = None if team.rank and team.whole else shared  # the other ranks get what the first one has
    hello = {**hello, "method": "" if method is None else repr(method)}
    if method is None or isinstance(method, ServerMethod):
        if method is not None:
            lend(method)  # which says why not, before anybody is dialled
        shard = (team.rank, team.size) if team.size > 1 else None
        remote = Remote(place, x0[team.part(len(x0))], hello, parse, shard, mine)
        remote.stopped, remote.log = stopped, log
        if team.size > 1:
            return Worker(Together(remote, team, len(x0)), log, lend)
        with contextlib.suppress(OtherKind):  # it names a method whose workers are peers
            return Worker(remote, log, lend)
    return Peer(place, x0, hello, parse, log, lend, stopped, team, mine)
