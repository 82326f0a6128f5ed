"""Methods with their arithmetic taken out, for runs that cost time and nothing else: what they say, and when, is left.

Where nothing is learnt, all points are one and all gradients 0, so that messages differ in nothing that a cluster can
tell. A still method gives what the method gave the first time, and touches no tensor again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..core.gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from ..core.method import Message, Method, ServerMethod
from ..core.periodic import OuterMethod, PeriodicMethod


def still(method: Method, x0: Tensor) -> Method:
    """``method`` without its arithmetic, for a run at ``x0`` [d]; itself where the arithmetic decides who waits."""
    if isinstance(method, ServerMethod):
        if method.gated or type(method).length is not ServerMethod.length:
            return method
        state, own, reply = method.admit(method.init_server(x0))
        w = method.local(method.init(reply), x0 * 0)
        visit = state, own, reply
        return _still(
            method,
            init=lambda reply: w,
            params=lambda w: x0,
            local=lambda w, g: w,
            push=_always(method.push(w)),
            pull=lambda w, reply: w,
            init_server=lambda x: state,
            admit=lambda s: visit,
            leave=lambda s, own: s,
            serve=lambda s, own, msg: visit,
            master=lambda s: x0,
        )
    w = method.init(x0)
    handlers: dict[str, Callable[..., Any]] = {"params": lambda w: x0, "local": lambda w, g: w}
    if isinstance(method, OuterMethod):
        inner = still(method.inner, x0)
        return _still(method, **handlers, **_periodic(method, w), inner=inner)
    if isinstance(method, PeriodicMethod):
        return _still(method, **handlers, **_periodic(method, w))
    if isinstance(method, GossipMethod):
        handlers |= {"returned": lambda w, msg: w, "inherit": lambda w, gone: w, "welcome": lambda w: (w, w)}
    if isinstance(method, RoundGossipMethod):
        message = next(iter(method.send(w, {1: 0.5}, 0.5)[1].values()))

        def send(w: Any, out: Mapping[int, float], keep: float) -> tuple[Any, dict[int, Message]]:
            return w, dict.fromkeys(out, message)

        handlers |= {"send": send, "merge": lambda w, inbox, into, own: w}
    elif isinstance(method, PushGossipMethod):
        said = w, method.send(w)[1]
        handlers |= {"send": lambda w: said, "receive": lambda w, msg: w}
    elif isinstance(method, PairGossipMethod):
        offer = method.offer(w)
        met = w, method.meet(w, offer)[1]
        handlers |= {"offer": _always(offer), "meet": lambda w, msg: met, "settle": lambda w, reply: w}
    return _still(method, **handlers)


def _periodic(method: PeriodicMethod, w: Any) -> dict[str, Callable[..., Any]]:
    return {
        "contribute": _always(method.contribute(w)),
        "absorb": lambda w, mean: w,
        "welcome": lambda w: (w, w),
    }


def _always(answer: Any) -> Callable[..., Any]:
    return lambda w: answer


def _still(method: Method, **handlers: Any) -> Method:
    """A copy of ``method``, of its own kind, with these in place of its handlers."""
    copy = object.__new__(type(method))
    copy.__dict__.update(method.__dict__ | handlers)
    return copy
