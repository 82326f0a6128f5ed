"""Peers that have dialled this one: a thread reads what each says, or the loop where it is there first."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NoReturn

from .incarnation import Incarnation
from .link import Frame, Link, LinkLost, accept, look_out
from .protocol.wire import Corrupt, Header, Kind
from .way import offered

PAUSE = 0.005
"""Seconds for which a thread leaves a peer's messages to the loop, which has taken the last one."""


@dataclass(eq=False)
class Caller:
    """A peer that has dialled: a thread reads what it says, but where the loop is there first, as it may be when it waits."""

    link: Link
    hello: Header
    reading: threading.Lock = field(default_factory=threading.Lock)  # who has it, reads
    met: int = 0  # messages that the loop has read
    left: threading.Event = field(default_factory=threading.Event)  # set where the loop sleeps, and looks no more
    error: Exception | None = None  # what the loop has met


class Callers:
    """Listens for other peers in one life of this one, and hands on what they say.

    ``due`` are the kinds of messages that they may send, and the bytes of each; ``sizes`` the bytes that this end puts and
    takes at most. ``take`` gets each frame with its link; ``join`` gets the link of who wants to join an average, the
    average's name and the hello. ``awaited`` says that the loop waits for messages of certain peers.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        listener: socket.socket,
        token: str,
        due: dict[Kind, int],
        sizes: tuple[int, int],
        awaited: bool,
        take: Callable[[Link, Frame], None],
        join: Callable[[Link, str, Header], None],
    ) -> None:
        self.incarnation, self.listener, self.token = incarnation, listener, token
        self.due, self.sizes, self.awaited = due, sizes, awaited
        self.take, self.join = take, join
        self.incoming: set[Caller] = set()

    def accept(self) -> None:
        """Take calls, a thread for each, until this life is over."""
        own = self.incarnation
        while not own.over.is_set():
            try:
                sock, address = self.listener.accept()
            except OSError:
                time.sleep(0.05)  # what is refused to one peer, such as too many files, passes
                continue
            try:
                own.spawn(self._react, sock, f"the peer at {address[0]}:{address[1]}")
            except RuntimeError as error:
                sock.close()
                own.log.warning(
                    f"refused: no thread for the peer at {address[0]}:{address[1]} ({error}); it dials again"
                )
        self.listener.close()

    def hang_up(self) -> None:
        """End all calls, and listen no more. Under the monitor."""
        for caller in list(self.incoming):
            caller.link.hang_up()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # else it would wait for one more peer

    def look_out(self, workers: Collection[int], there: Callable[[], bool]) -> None:
        """Read for a moment, in the loop's thread, what these workers say, until all that it waits for is ``there``."""
        with self.incarnation.monitor:
            callers = [caller for caller in list(self.incoming) if caller.hello.worker in workers]

        def looks() -> bool:
            for caller in callers:
                self._look_in(caller)
            return there()

        for caller in callers:
            caller.left.clear()
        if not look_out(looks):
            for caller in callers:
                caller.left.set()

    def _react(self, sock: socket.socket, name: str) -> None:
        """Answer one other peer."""
        own = self.incarnation
        with contextlib.ExitStack() as links:
            links.callback(sock.close)
            try:
                link = links.enter_context(contextlib.closing(accept(sock, self.token, name, own.timeout)))
                hello = link.recv({Kind.HELLO: 0}, "its hello")
                link.name = f"worker {hello.header.worker}"
                if isinstance(hello.note, dict) and "circle" in hello.note:
                    self.join(link, str(hello.note["circle"]), hello.header)
                    links.pop_all()
                    return
                other = hello.note.get("machine") if isinstance(hello.note, dict) else None
                better, way = offered(link, other, own.transport, self.sizes)
                links.callback(better.close)
                caller = Caller(better, hello.header)
                with own.monitor:
                    self.incoming.add(caller)
                    links.callback(self.incoming.discard, caller)
                with caller.reading:
                    link.send(own.head._replace(kind=Kind.WELCOME), None, way)
                    better.meet()
                self._listen(caller)
            except LinkLost:
                pass  # whoever it was comes again, or is dead, which the coordinator says
            except Exception as error:  # of what the other end has sent, or for want of memory
                what = str(error) if isinstance(error, ValueError | OSError) else repr(error)
                own.log.warning(f"refused: {what}: no link is made")

    def _listen(self, caller: Caller) -> NoReturn:
        """Take all that a peer says, but for what the loop takes."""
        while not self.awaited:
            self._hear_out(caller)
        met = 0
        while True:
            if caller.met != met:  # it comes for the next one as well, and need not wake this thread for it
                met = caller.met
                caller.left.wait(PAUSE)
            elif caller.link.waiting(60.0):
                with caller.reading:
                    if caller.error is not None:
                        raise caller.error
                    if caller.met == met:
                        self._hear_out(caller)

    def _look_in(self, caller: Caller) -> None:
        """Take what a peer has said, if nobody is at it: for the loop, while it waits."""
        if not caller.reading.acquire(blocking=False):
            return
        try:
            if caller.error is None and caller.link.waiting(0):
                self._hear_out(caller)
                caller.met += 1
        except (LinkLost, Corrupt, ValueError) as error:
            caller.error = error  # for the thread
            caller.link.hang_up()
        finally:
            caller.reading.release()

    def _hear_out(self, caller: Caller) -> None:
        """Take one message of a peer."""
        link, hello, own = caller.link, caller.hello, self.incarnation
        frame = link.recv(self.due, "its next message", patient=not self.awaited, lent={Kind.ASK})
        if frame.header[2:4] != hello[2:4]:
            raise Corrupt(
                f"life {frame.header.incarnation} of worker {frame.header.worker} speaks on the link of life "
                f"{hello.incarnation} of worker {hello.worker}: refused"
            )
        try:
            self.take(link, frame)
        except (LinkLost, Corrupt):
            raise
        except Exception as error:  # of a handler: it would come again however often the message does
            with contextlib.suppress(LinkLost):
                link.send(own.head._replace(kind=Kind.REFUSED), None, {"why": repr(error)[:1000]})
            own.fail(error)
            raise LinkLost(f"this worker has failed ({error!r})") from error
