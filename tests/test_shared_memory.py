"""Memory that two processes share: an end that dials touches nothing but what a host makes for that."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from offbeat.runtime.link import Link, LinkLost
from offbeat.runtime.protocol.wire import Corrupt, Header, Kind
from offbeat.runtime.shared_memory import SharedLink
from offbeat.runtime.way import taken

SIZE = 4096
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the memory has no name on Linux only")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def test_both_ends_have_the_memory_of_the_one_that_made_it(ends: tuple[socket.socket, socket.socket]) -> None:
    here = SharedLink(ends[0], "there", 20.0, (SIZE, SIZE))
    there = SharedLink(ends[1], "here", 20.0, (SIZE, SIZE), here.offer()["path"])
    data = torch.arange(SIZE).to(torch.uint8)
    for one, other in ((here, there), (there, here)):
        one.send(Header(Kind.PUSH), data)
        assert torch.equal(other.recv({Kind.PUSH: SIZE}, "a payload").payload, data)
    here.close()
    assert not os.path.exists(here.path)
    there.close()


def regular(folder: Path) -> tuple[str, Path]:
    file = folder / "offbeat-mine"
    file.write_bytes(bytes(2 * SIZE))
    file.chmod(0o600)
    return str(file), file


def link(folder: Path) -> tuple[str, Path]:
    path, file = regular(folder)
    (folder / "link").symlink_to(path)
    return str(folder / "link"), file


def opened(folder: Path) -> tuple[str, Path]:
    path, file = regular(folder)
    return f"/proc/self/fd/{os.open(path, os.O_RDWR)}".replace("self", str(os.getpid())), file


def fifo(folder: Path) -> tuple[str, Path]:
    os.mkfifo(folder / "fifo")
    return str(folder / "fifo"), regular(folder)[1]


def opened_fifo(folder: Path) -> tuple[str, Path]:
    path, file = fifo(folder)
    return f"/proc/{os.getpid()}/fd/{os.open(path, os.O_RDWR | os.O_NONBLOCK)}", file


def memory(name: str, size: int) -> Callable[[Path], tuple[str, Path]]:
    def make(folder: Path) -> tuple[str, Path]:
        fd = os.memfd_create(name)
        os.truncate(fd, size)
        return f"/proc/{os.getpid()}/fd/{fd}", regular(folder)[1]

    return make


OFFERS: dict[str, Callable[[Path], tuple[str, Path]]] = {
    "a file": regular,
    "a link": link,
    "an open file": opened,
    "a fifo": fifo,
    "an open fifo": opened_fifo,
    "a device": lambda folder: ("/dev/zero", regular(folder)[1]),
    "a file of the system": lambda folder: ("/etc/passwd", regular(folder)[1]),
    "nothing": lambda folder: (str(folder / "none"), regular(folder)[1]),
    "no such process": lambda folder: ("/proc/1/fd/987654", regular(folder)[1]),
    "memory of another": memory("somebody", 2 * SIZE),
    "too little memory": memory("offbeat", SIZE),
    "too much memory": memory("offbeat", 1 << 40),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_what_a_host_offers_in_its_place_is_not_touched(
    offer: str, tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    """A worker that dials a hostile host loses no file, maps nothing, and waits for nobody."""
    before = set(os.listdir("/proc/self/fd"))
    path, file = OFFERS[offer](tmp_path)
    with ExitStack() as made:
        if path.startswith(f"/proc/{os.getpid()}/fd/"):
            made.callback(os.close, int(path.rpartition("/")[2]))
        with pytest.raises(LinkLost, match=r"not touched|cannot be mapped"):
            SharedLink(ends[0], "the server", 20.0, (SIZE, SIZE), path)
    assert file.read_bytes() == bytes(2 * SIZE)
    assert file.stat().st_mode & 0o777 == 0o600
    assert set(os.listdir("/proc/self/fd")) == before, "no file stays open"


@pytest.mark.parametrize(
    "note", [{}, {"sizes": [1]}, {"sizes": [1, "2"]}, {"sizes": [-1, 8]}, {"sizes": 7}, {"sizes": [8, 8]}]
)
def test_an_offer_that_makes_no_sense_is_refused(
    note: dict[str, Any], ends: tuple[socket.socket, socket.socket]
) -> None:
    with pytest.raises((Corrupt, LinkLost), match="offers"):
        taken(Link(ends[0], "the server", 20.0), {"transport": "shared", **note})
