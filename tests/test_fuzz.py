"""What a server is sent that it should not be: all of it is refused and named, and nothing of it stays."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import TOKEN, Serving, hire, until
from torch import Tensor

import offbeat as ob
from offbeat.core.tree import finite, tame
from offbeat.runtime.host import Terms
from offbeat.runtime.link import GREETING, Link, LinkLost, dial, machine
from offbeat.runtime.protocol.wire import (
    MAGIC,
    NOTE,
    PROTOCOL,
    SIZE,
    Corrupt,
    Form,
    Header,
    Kind,
    checksum,
)
from offbeat.runtime.shared_memory import SharedLink

PROBLEM = ob.tasks.Quadratic(d=64, noise=0.3)
METHOD = ob.methods.DanaZero(lr=0.01)
STRANGERS, HELLOS, MESSAGES = 2000, 1000, 1000
MEGABYTES = 8
"""By how much the process may grow while it refuses a thousand things: a session that stayed would be eight times that."""

Serve = Callable[..., Serving]
Random = random.Random


class Target:
    """A live server with one good worker, and what must not change about it."""

    def __init__(self, serve: Serve, transport: str = "tcp", timeout: float = 20.0) -> None:
        self.run = serve(Terms(METHOD, 10**9, 10**6, beat=0.1, timeout=timeout, transport=transport))
        self.worker = hire(self.run.place(0), PROBLEM)
        for _ in range(5):
            self.step()
        self.expected = 0
        self.x, self.state = self.run.x().clone(), [t.clone() for t in leaves(self.run)]
        self.run.trace()  # whose file is open from now on
        gc.collect()
        self.threads, self.files, self.size = threading.active_count(), files(), resident()

    def step(self) -> None:
        g, loss = PROBLEM.grad(self.worker.x, 0, self.worker.node.step)
        self.worker.step(g, float(loss))

    def check(self) -> None:
        """Nothing of what was refused stays: no number has changed, no thread, file or memory is held; all is counted."""
        until(lambda: list(self.run.server.sessions) == [0], "the end of all other sessions", 30)
        until(lambda: threading.active_count() <= self.threads, "the end of their threads", 30)
        gc.collect()
        assert torch.equal(self.run.x(), self.x)
        assert all(torch.equal(a, b) for a, b in zip(leaves(self.run), self.state, strict=True))
        until(lambda: files() <= self.files, "the end of their files", 30)  # the server opens some for a moment, too
        assert resident() - self.size < MEGABYTES << 20
        refused = [line for line in self.run.said if line.startswith("refused: ")]
        assert self.run.server.refused == len(refused) == self.expected
        assert not any("Traceback" in line for line in self.run.said)
        life = self.worker.life
        self.step()  # and the good one goes on
        assert self.worker.life == life == 1
        assert not torch.equal(self.run.x(), self.x)
        self.worker.leave(done=False)


def leaves(run: Serving) -> list[Tensor]:
    """The shared state, and what is kept for the good worker."""
    server = run.server.server
    assert server is not None
    return [t for part in (server.state, server.own[0]) for t in flatten(part)]


def flatten(part: Any) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else [t for p in part for t in flatten(p)]


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# strangers


def connect(target: Target) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", target.run.server.port), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def rest(sock: socket.socket) -> bytes:
    """All that comes until the other end hangs up."""
    data = b""
    try:
        while part := sock.recv(1000):
            data += part
    except ConnectionError:
        pass
    return data


def stranger(rng: Random, target: Target) -> bool:
    """Somebody without the token; whether that is a refusal, and not only somebody who has gone."""
    size = len(GREETING) + 32
    with connect(target) as sock:
        match rng.randrange(6):
            case 0:  # goes at once, or in the middle
                sock.sendall(GREETING + rng.randbytes(rng.randrange(32)))
                return False
            case 1:  # says anything
                sock.sendall(rng.randbytes(rng.randrange(size, 3 * size)))
            case 2:  # speaks almost as one should
                greeting = bytearray(GREETING)
                greeting[rng.randrange(len(greeting))] ^= 1 << rng.randrange(8)
                sock.sendall(bytes(greeting) + rng.randbytes(32))
            case 3:  # guesses the proof
                sock.sendall(GREETING + rng.randbytes(32) + rng.randbytes(32))
            case 4:  # sends the server's own words back, and then frames
                sock.sendall(GREETING + rng.randbytes(32))
                said = sock.recv(size, socket.MSG_WAITALL)
                sock.sendall(said[-32:] + Header(Kind.HELLO).pack())
            case _:  # has another token, and a good hello
                try:
                    dial(target.run.address, rng.choice(["", "guess", TOKEN[:-1]]), "the server", 20.0)
                except PermissionError:
                    return True
                raise AssertionError("a link without the token")
        assert len(rest(sock)) <= size + 32  # at most a greeting and a no
        return True


def test_strangers_get_no_link(serve: Serve) -> None:
    """Whatever they say, it is never a frame: they are refused before one is read."""
    target, rng = Target(serve), Random(1)
    for _ in range(STRANGERS):
        target.expected += stranger(rng, target)
    target.check()
    assert {line.split(": ", 1)[1].split("127.0.0.1", 1)[0] for line in target.run.said if "refused" in line} == {
        "the worker at "
    }


def test_strangers_who_say_nothing_are_sent_away(serve: Serve) -> None:
    """So are those who say a byte now and then; meanwhile the good worker goes on."""
    target = Target(serve, timeout=5.0)
    silent, slow = [connect(target) for _ in range(40)], [connect(target) for _ in range(4)]
    for byte in GREETING:
        for sock in slow:
            try:
                sock.sendall(bytes([byte]))
            except ConnectionError:
                continue
        time.sleep(0.15)
        target.step()
    target.x, target.state = target.run.x().clone(), [t.clone() for t in leaves(target.run)]
    for sock in silent + slow:
        with sock:
            assert rest(sock) == b""
    target.check()


# those who know the token


def enter(target: Target, note: Any = None, kind: Kind = Kind.HELLO, **fields: Any) -> tuple[Link, Header]:
    """A link on which a hello has been said."""
    link = dial(target.run.address, TOKEN, "the server", 20.0)
    hello = {"worker": 7, "named": True, "parameters": PROBLEM.d, "shard": [0, 1], "machine": "elsewhere", "want": 1}
    head = Header(kind, 1, **fields)
    link.send(head, None, hello if note is None else note)
    return link, head


def vacant(target: Target) -> None:
    """Wait until the server has no worker 7: another process that asks for a number before is told to ask again."""
    until(lambda: 7 not in target.run.server.sessions, "the end of the worker 7 before", 30)


def answer(link: Link) -> tuple[Kind, Any, bytes]:
    """The next frame, as it comes."""
    header = Header.unpack(link._read(SIZE, "an answer"))
    note = json.loads(link._read(header.note, "a note")) if header.note else None
    return header.kind, note, link._read(header.length, "a payload")


def refused(link: Link, what: str) -> str:
    """The server's refusal, the last that comes."""
    kind, note, _ = answer(link)
    assert kind == Kind.REFUSED, kind
    assert note["what"] == what, note
    assert rest(link.sock) == b""
    link.close()
    return str(note["why"])


def anything(rng: Random, depth: int = 0) -> Any:
    """A JSON value that nobody expects."""
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([-1, 0, 1, 2**31, 2**64, -(2**70), 10**400, rng.randrange(10**6)]),
        lambda: rng.choice([0.5, -0.0, float("inf"), float("nan"), 1e308]),
        lambda: rng.choice(["", "7", "DanaZero()", "__import__('os')", "(" * 50, "\0", "ü" * 9, "x" * 3000]),
    ]
    if depth < 3 and rng.random() < 0.3:
        if rng.random() < 0.5:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice("abc"): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(simple)()


CLAIMS = ("worker", "parameters", "shard", "method")  # what of a hello must be right
REST = ("named", "process", "machine", "want", "layout", "problem", "unknown")


def hello(rng: Random, target: Target) -> bool:
    """Somebody who knows the token says a hello that is none, or an odd one; whether it was refused."""
    good = {"worker": 7, "named": True, "parameters": PROBLEM.d, "shard": [0, 1], "machine": "elsewhere", "want": 1}
    match rng.randrange(6):
        case 0:  # no frame
            link = dial(target.run.address, TOKEN, "the server", 20.0)
            link._write(rng.randbytes(SIZE))
            refused(link, "corrupt")
        case 1:  # a header with some bits flipped
            link = dial(target.run.address, TOKEN, "the server", 20.0)
            link._write(flip(rng, Header(Kind.HELLO, 1).pack()))
            refused(link, "corrupt")
        case 2:  # another frame
            kind = rng.choice([k for k in Kind if k not in (Kind.HELLO, Kind.BEAT)])
            said = "no buffers" if kind == Kind.SHARED else "where HELLO, SHARED is due"
            assert said in refused(enter(target, kind=kind)[0], "corrupt")
        case 3:  # a note that is no JSON, or too deep
            link = dial(target.run.address, TOKEN, "the server", 20.0)
            text = rng.choice([b"{", b"\xff\xfe", b"[" * 10_000, b"nul", rng.randbytes(40) + b"}", b"9" * 5000])
            link._write(Header(Kind.HELLO, 1, note=len(text)).pack() + text)
            assert "no JSON" in refused(link, "corrupt")
        case 4:  # a claim that is not so
            claim = rng.choice(CLAIMS)
            value = anything(rng)
            while (claim == "worker" and (value is None or (type(value) is int and 0 <= value < 2**31))) or (
                claim == "method" and not value
            ):
                value = anything(rng)
            note = good | {claim: value} if rng.random() < 0.8 else {k: v for k, v in good.items() if k != "parameters"}
            vacant(target)
            refused(enter(target, note)[0], "refused")
        case _:  # what is right where it must be, and anything elsewhere
            vacant(target)
            link, _ = enter(target, good | {rng.choice(REST): anything(rng) for _ in range(3)})
            kind, note, _ = answer(link)
            assert kind == Kind.WELCOME, note
            assert note["worker"] > 0
            assert answer(link)[0] == Kind.REPLY
            link.close()
            return False
    return True


def flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    while bytes(changed) == data:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_hellos_that_are_none(serve: Serve) -> None:
    """Any header, any note: refused with a reason, or welcomed where all that counts is right."""
    target, rng = Target(serve), Random(2)
    for _ in range(HELLOS):
        target.expected += hello(rng, target)
    target.check()


FORM = Form(torch.empty(PROBLEM.d, dtype=torch.float64, device="meta"))


def forged(**fields: int) -> bytes:
    """A header that the library would not make, with the right checksum."""
    plain = dict(zip(Header._fields, Header(Kind.PUSH), strict=True)) | {"magic": MAGIC, "protocol": PROTOCOL} | fields
    order = ("magic", "kind", "dtype", "protocol", *Header._fields[2:])
    head = struct.pack("<4sBBHiIQQQIQI", *(plain[name] for name in order))
    return head + zlib.crc32(head).to_bytes(4, "little")


def message(rng: Random, target: Target) -> None:
    """A worker that has joined brings what is refused."""
    link, _ = enter(target)
    kind, note, _ = answer(link)
    assert kind == Kind.WELCOME, note
    life = {"worker": 7, "incarnation": note["incarnation"], "dtype": 1}
    assert answer(link)[0] == Kind.REPLY
    g = torch.randn(PROBLEM.d, dtype=torch.float64, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    payload = FORM.pack(g)
    text = json.dumps({"losses": [1.0], "used": 1, "want": 1}).encode()
    good = life | {"length": payload.numel(), "gradients": 1, "checksum": checksum(payload), "note": len(text)}
    body = payload.numpy().tobytes()
    what = "corrupt"
    match rng.randrange(5):
        case 0:  # bits of the header
            frame = flip(rng, forged(**good)) + text + body
        case 1:  # a field of it, and its checksum is right
            field = rng.choice(list(BAD))
            frame = forged(**good | {field: BAD[field](rng, good.get(field, 0))}) + text + body
        case 2:  # bits of the payload
            changed = flip(rng, body)
            while checksum(torch.frombuffer(bytearray(changed), dtype=torch.uint8)) == good["checksum"]:
                changed = flip(rng, body)  # a sum does not see two flips that cancel
            frame = forged(**good) + text + changed
        case 3:  # its length
            size = rng.choice([n for n in range(0, 2000, 8) if n != len(body)])
            frame = forged(**good | {"length": size}) + text + rng.randbytes(size)
        case _:  # numbers that are none, and any note
            g[rng.randrange(PROBLEM.d)] = rng.choice([float("nan"), float("inf"), -float("inf")])
            payload = FORM.pack(g)
            text = json.dumps(
                {rng.choice(["losses", "compute", "waited", "used", "failed", "back", "want"]): anything(rng)}
            ).encode()
            frame = forged(**good | {"checksum": checksum(payload), "note": len(text)})
            frame += text + payload.numpy().tobytes()
            what = "diverged"
    link._write(frame)
    refused(link, what)


BAD: dict[str, Callable[[Random, int], int]] = {
    "kind": lambda rng, n: rng.choice([k for k in range(256) if k not in (Kind.PUSH, Kind.BEAT)]),
    "dtype": lambda rng, n: rng.choice([0, 2, 3, 4, 255]),
    "protocol": lambda rng, n: rng.choice([0, PROTOCOL + 1, 65535]),
    "worker": lambda rng, n: rng.choice([-1, 0, 6, 8, 2**31 - 1]),
    "incarnation": lambda rng, n: n + rng.choice([-1, 1, 1000]),
    "step": lambda rng, n: rng.choice([1, 2, 2**63]),
    "length": lambda rng, n: rng.choice([0, n - 8, n + 8, 2**63]),
    "gradients": lambda rng, n: rng.choice([0, 2, 8, 2**32 - 1]),
    "checksum": lambda rng, n: n ^ 1 << rng.randrange(64),
    "note": lambda rng, n: rng.choice([n - 1, n + 1, n + 8, NOTE + 1, 2**32 - 1]),
}


def test_messages_that_are_refused(serve: Serve) -> None:
    """Any header, payload or note of a worker that has joined: the model stays bit for bit, and it is told why."""
    target, rng = Target(serve), Random(3)
    for _ in range(MESSAGES):
        message(rng, target)
    target.expected = MESSAGES
    target.check()


@pytest.mark.parametrize("field", BAD)
def test_each_field_of_a_header_is_checked(serve: Serve, field: str) -> None:
    """Whatever is wrong with it is named."""
    target = Target(serve)
    link, _ = enter(target)
    _, note, _ = answer(link)
    answer(link)
    payload = FORM.pack(torch.ones(PROBLEM.d, dtype=torch.float64))
    text = b'{"used": 1}'
    good = {"worker": 7, "incarnation": note["incarnation"], "dtype": 1, "length": 512, "gradients": 1}
    good |= {"checksum": checksum(payload), "note": len(text)}
    link._write(forged(**good | {field: BAD[field](Random(0), good.get(field, 0))}) + text + payload.numpy().tobytes())
    why = refused(link, "corrupt")
    names = {
        "kind": ("is due", "a header with kind"),
        "dtype": ("of dtype", "dtype"),
        "protocol": ("this end speaks",),
        "worker": ("speaks on the link of life",),
        "incarnation": ("speaks on the link of life",),
        "step": ("due are 1 from step 0 on",),
        "length": ("bytes of PUSH where 512 are due",),
        "gradients": ("due are 1 from step 0 on",),
        "checksum": ("do not meet their checksum",),
        "note": ("no JSON", "a note of"),
    }[field]
    assert any(name in why for name in names), why
    target.expected = 1
    target.check()


def test_odd_notes_do_not_hurt_a_good_message(serve: Serve) -> None:
    """Losses and times are for the table: the model takes the gradients, and the trace has a number or nan for each."""
    run = serve(Terms(ob.methods.ASGD(lr=0.1), 10**9, 10**6, beat=0.1, transport="tcp"))
    worker, rng = hire(run.place(0), PROBLEM), Random(4)
    x = PROBLEM.x0()
    for step in range(300):
        g, loss = PROBLEM.grad(x, 0, step)
        x = torch.add(x, g, alpha=-0.1)
        worker.exchange.push(
            g,
            1,
            {"losses": [float(loss)], "want": 1, "used": 1}
            | {  # type: ignore[attr-defined]
                rng.choice(["losses", "compute", "waited", "used", "failed", "back", "want"]): anything(rng)
                for _ in range(2)
            }
            | {"want": 1},
        )
        worker.exchange.reply()  # type: ignore[attr-defined]
    assert torch.equal(run.x(), x)
    worker.leave(done=False)
    run.stop()
    assert run.server.refused == 0
    assert run.trace().column("step").tolist() == list(range(300))


def test_messages_that_break_off(serve: Serve) -> None:
    """A worker that goes in the middle of a frame is lost, and nothing of the frame is taken."""
    target, rng = Target(serve), Random(5)
    for _ in range(200):
        link, _ = enter(target)
        _, note, _ = answer(link)
        answer(link)
        payload = FORM.pack(torch.ones(PROBLEM.d, dtype=torch.float64))
        head = Header(Kind.PUSH, 1, 7, note["incarnation"], length=512, gradients=1, checksum=checksum(payload))
        frame = head.pack() + payload.numpy().tobytes()
        link._write(frame[: rng.randrange(len(frame))])
        link.close()
    target.check()


@pytest.mark.parametrize("transport", ["shared", "gloo", "tcp"])
def test_joining_that_breaks_off(serve: Serve, transport: str) -> None:
    """Wherever a worker goes while it joins: no thread, file or memory of it stays, and nobody else waits."""
    target, rng = Target(serve, transport, timeout=2.0), Random(6)
    hello = {"worker": 7, "parameters": PROBLEM.d, "machine": machine()}
    for _ in range(60):
        match rng.randrange(3):
            case 0:  # after the greeting
                dial(target.run.address, TOKEN, "the server", 20.0).close()
            case 1:  # after the hello
                enter(target, hello)[0].close()
            case _:  # after the welcome
                link, _ = enter(target, hello)
                kind, note, _ = answer(link)
                assert (kind, note["transport"]) == (Kind.WELCOME, transport)
                if transport == "shared" and rng.random() < 0.5:
                    mapped = SharedLink(link.sock, "the server", 20.0, tuple(reversed(note["sizes"])), note["path"])
                    mapped.close()
                link.close()
    target.check()


def test_states_that_would_overflow_are_refused(serve: Serve) -> None:
    """Finite messages whose sum is not: the server keeps the state that it had, and goes on with other workers."""
    run = serve(Terms(ob.methods.BackupWorkers(), 10**9, 10**6, beat=0.1, transport="tcp"))
    first, second = hire(run.place(0), PROBLEM), hire(run.place(1), PROBLEM)
    huge = torch.full((PROBLEM.d,), 0.9e308, dtype=torch.float64)
    waiting = threading.Thread(target=lambda: first.step(huge, 0.0))
    waiting.start()
    until(lambda: run.server.server.version == 1, "the first message")  # type: ignore[union-attr]
    before = run.server.server.state  # type: ignore[union-attr]
    with pytest.raises(ob.Diverged, match="worker 1, step 0: the model would not be finite any more; lower the"):
        second.step(huge, 0.0)
    until(lambda: 1 not in run.server.sessions, "its end")
    waiting.join(30)
    assert all(bool(torch.isfinite(t).all()) for t in flatten(run.server.server.state))  # type: ignore[union-attr]
    assert torch.equal(before.sum, huge)
    kill = [worker.exchange for worker in (first, second)]
    for exchange in kill:
        exchange.leave({})
    assert [i.what for i in run.trace().incidents].count("diverged") == 1


def test_a_worker_whose_gradient_is_not_finite_is_told(serve: Serve) -> None:
    """It raises Diverged with its number and step; the model stays, and others go on."""
    run = serve(Terms(METHOD, 10**9, 10**6, beat=0.1))
    good, bad = hire(run.place(0), PROBLEM), hire(run.place(3), PROBLEM)
    for _ in range(2):
        good.step(torch.ones(PROBLEM.d, dtype=torch.float64), 0.0)
        bad.step(torch.ones(PROBLEM.d, dtype=torch.float64), 0.0)
    x = run.x()
    with pytest.raises(ob.Diverged, match="worker 3, step 2: the message is not finite; lower the") as caught:
        bad.step(torch.full((PROBLEM.d,), torch.nan, dtype=torch.float64), 0.0)
    assert (caught.value.worker, caught.value.step) == (3, 2)
    assert torch.equal(run.x(), x)
    good.step(torch.ones(PROBLEM.d, dtype=torch.float64), 0.0)
    for worker in (good, bad):
        worker.leave(done=False)


# the parts


def test_headers_are_read_as_they_were_written() -> None:
    """Any header comes back; of ten thousand with some bits changed, and as many random ones, none does."""
    rng = Random(7)
    for _ in range(10_000):
        header = Header(
            Kind(rng.randrange(10)),
            rng.randrange(4),
            rng.randrange(-1, 2**31),
            rng.getrandbits(32),
            *(rng.getrandbits(64) for _ in range(3)),
            rng.getrandbits(32),
            rng.getrandbits(64),
            rng.randrange(NOTE + 1),
        )
        data = header.pack()
        assert Header.unpack(data) == header
        for bad in (flip(rng, data), rng.randbytes(SIZE), data[: rng.randrange(SIZE)], data + b"\0"):
            with pytest.raises(Corrupt):
                Header.unpack(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_messages_are_read_as_they_were_packed(dtype: torch.dtype) -> None:
    """Any structure, any length, any part of a longer vector; another shape or dtype is refused."""
    for size in (1, 2, 3, 5, 8, 13):
        for start in range(9):
            x = torch.arange(40).to(dtype)[start : start + size]
            count = torch.tensor(3.0, dtype=dtype)
            for message in (x, (x,), (x, count), (count, x, (x, count, x))):
                form = Form.of(message)
                data = form.pack(message)
                assert data.numel() == form.bytes
                assert data.numel() % 8 == 0
                assert checksum(data) >= 0
                again = form.unpack(data.clone())
                assert [t.tolist() for t in flatten(again)] == [t.tolist() for t in flatten(message)]
                assert type(again) is type(message)
    form = Form.of((x, count))
    for wrong in ((x[1:], count), (x, x), (x,), (x, count, x), (x.to(torch.int32), count), x):
        with pytest.raises(Corrupt, match="due"):
            form.pack(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_finite_sees_every_number_that_is_none(dtype: torch.dtype) -> None:
    """Wherever it is, and whatever is beside it; the largest numbers are finite, though not tame."""
    largest = torch.finfo(dtype).max
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in range(5):
            x = torch.ones(5, dtype=dtype)
            x[place] = bad
            assert not finite((torch.ones(3, dtype=dtype), x))
            assert not tame((torch.ones(3, dtype=dtype), x))
        assert not finite(torch.tensor(bad, dtype=dtype))
    x = torch.full((5,), largest, dtype=dtype)
    assert finite((x, torch.tensor(-largest, dtype=dtype), torch.empty(0, dtype=dtype)))
    assert not tame(x)
    assert tame(torch.full((5,), 7.0, dtype=dtype))


def test_a_link_that_was_closed_is_lost() -> None:
    """Whoever waits, sends or listens is told so."""
    a, b = socket.socketpair()
    link, other = Link(a, "it", 5.0), Link(b, "other", 5.0)
    other.close()
    for action in (lambda: link.recv({Kind.PUSH: 0}, "a push"), link.drain, lambda: link.send(Header(Kind.BEAT))):
        with pytest.raises(LinkLost, match=r"it has hung up|it is gone"):
            action()  # type: ignore[no-untyped-call]
    link.close()
    with pytest.raises(LinkLost):
        link.waiting(0)


def test_signs_of_life_are_no_messages() -> None:
    """Any number of them may come before what is waited for; one that waits its turn takes nothing else."""
    a, b = socket.socketpair()
    link, other = Link(a, "it", 5.0), Link(b, "other", 5.0)
    for _ in range(5):
        other.beat(Header(Kind.REPLY, worker=3))
    link.drain()
    other.beat(Header(Kind.REPLY))
    other.send(Header(Kind.PUSH), torch.zeros(8, dtype=torch.uint8), {"a": 1})
    frame = link.recv({Kind.PUSH: 8}, "a push")
    assert frame.note == {"a": 1}
    assert frame.payload.tolist() == [0] * 8
    other.send(Header(Kind.PUSH))
    with pytest.raises(Corrupt, match="it sent PUSH while it is its turn to listen"):
        link.drain()
    link.close()
    other.close()


def test_kinds_are_counted() -> None:
    assert Counter(type(k) for k in Kind) == {Kind: 24}
