"""A server's handler as one compiled kernel gives what it gives eagerly, whatever its inputs share, and compiles once."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import offbeat as ob
from offbeat.runtime.kernel import Kernel
from offbeat.runtime.message import leaves, rebuild

SERVERS = [cls for cls in ob.methods.all_methods() if issubclass(cls, ob.ServerMethod) and not cls.gated]
D = 12


def visits(cls: type[ob.ServerMethod], handle: Any, spare: Any = None) -> list[list[Tensor]]:
    """The states and replies of some visits by two workers, of which one comes when the other has been."""
    method, generator = cls(), torch.Generator().manual_seed(0)
    s = method.init_server(torch.randn(D, generator=generator))
    own: list[Any] = [None, None]
    found, w = [], [None, None]
    for k in range(8):
        i = 0 if k < 3 else k % 2
        if own[i] is None:
            s, mine, reply = method.admit(s)
            own[i] = rebuild(mine, [t.clone() for t in leaves(mine)])  # as the server does: a state shares no buffer
            w[i] = method.init(reply)
        for _ in range(method.length(w[i])):
            w[i] = method.local(w[i], 0.1 * torch.randn(D, generator=generator))
        before = s, own[i]
        s, own[i], reply = handle(s, own[i], method.push(w[i]))
        found.append([t.clone() for t in leaves((s, own[i], reply))])
        w[i] = method.pull(w[i], tuple(t.clone() for t in reply) if isinstance(reply, tuple) else reply.clone())
        if spare:
            spare(0, before[0])
            spare(1, before[1])
            spare(2, reply)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("cls", SERVERS, ids=lambda cls: cls.__name__)
def test_fused_is_eager(cls: type[ob.ServerMethod]) -> None:
    torch._dynamo.reset()
    kernel = Kernel(cls(), torch.zeros(D))
    with torch.compiler.set_stance("fail_on_recompile"):
        fused = visits(cls, kernel, kernel.spare)
    for mine, theirs in zip(fused, visits(cls, cls().serve), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
