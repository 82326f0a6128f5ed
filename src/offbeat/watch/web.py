"""Serving a run's page, its data and its metrics over HTTP, to this machine, or to those that know the run's token.

Three paths, and no files: ``/`` is the page, ``/state`` what it draws, ``/metrics`` what a monitoring system reads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import parse_qs, urlsplit

SECRET = 16
"""Bytes that a token has at least where other machines can try it."""
AT_ONCE = 32
"""Requests that are answered at the same time, at most; others are hung up on."""
PATIENCE = 10.0
"""Seconds that a request, and the reading of its answer, may take."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def address(text: str) -> tuple[str, int]:
    """Host and port of ``"8000"``, ``"10.0.0.1:8000"`` or ``"[::1]:8000"``; port 0: any that is free. ``ValueError`` for others."""
    host, colon, port = text.rpartition(":")
    host = host if colon else "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535 or not host or (":" in host and host[0] + host[-1] != "[]"):
        raise ValueError(f"--page {text}: must be a port, such as 8000 (0: any that is free), or HOST:PORT")
    return host, int(port)


def listen(text: str, token: str) -> socket.socket:
    """A socket that listens at the address ``text``. ``ValueError`` where that is bad or taken, or it can be reached from other
    machines and there is no secret to keep them out."""
    host, port = address(text)
    if not _loopback(host) and len(token.encode()) < SECRET:
        raise ValueError(
            f"--page {text} can be reached from other machines: set OFFBEAT_TOKEN to a secret of {SECRET} bytes or more first "
            "(openssl rand -hex 32 makes one); or keep to this machine and forward the port, as with ssh -L"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=AT_ONCE)
    except OSError as error:
        raise ValueError(
            f"--page {text} cannot be listened at ({error.strerror or error}): choose another port"
        ) from None


def url(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def cookie(token: str) -> str:
    """What a browser shows instead of the token, which would let it join the run."""
    return hmac.new(token.encode(), b"offbeat page", hashlib.sha256).hexdigest()


class Web(ThreadingHTTPServer):
    """Serves at ``listener`` what ``state`` (JSON) and ``metrics`` (text) return."""

    daemon_threads = True

    def __init__(
        self, listener: socket.socket, state: Callable[[], str], metrics: Callable[[], str], token: str = ""
    ) -> None:
        self.address_family = listener.family
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_name = listener, ""
        host, self.server_port = listener.getsockname()[:2]
        self.local, self.token = _loopback(host), token
        self.answers = {"/state": ("application/json", state), "/metrics": ("text/plain; version=0.0.4", metrics)}
        self._since: dict[socket.socket, float] = {}  # when each connection was made
        self._guard = threading.Lock()

    def process_request(self, request: socket.socket, address: object) -> None:  # type: ignore[override]
        with self._guard:
            full = len(self._since) >= AT_ONCE
            if not full:
                self._since[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._guard:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Hang up on those that take too long, twice a second: a client may send a byte now and then for ever."""
        with self._guard:
            late = [request for request, since in self._since.items() if time.monotonic() - since > PATIENCE]
        for request in late:
            with contextlib.suppress(OSError):  # it is gone
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, address: object) -> None:
        """A client that has hung up is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    """One request, one answer."""

    server: Web
    timeout = PATIENCE

    def version_string(self) -> str:
        return "offbeat"

    def log_message(self, format: str, *args: object) -> None:
        pass  # each page asks once a second

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        if self.server.local:
            if not self._for_this_machine():
                self._refuse(f"this page is for this machine only, as http://127.0.0.1:{self.server.server_port}/")
                return
        elif given and self._right(given):
            self.send_response(303)
            self.send_header("Location", parts.path)
            self.send_header(
                "Set-Cookie", f"{self._name}={cookie(self.server.token)}; Path=/; HttpOnly; SameSite=Strict"
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        elif not self._known():
            self._refuse(
                "this page needs the run's token: open it once with ?token=... at the end, the value of OFFBEAT_TOKEN"
            )
            return
        if parts.path == "/":
            self._answer(200, "text/html", page().encode())
        elif parts.path in self.server.answers:
            kind, make = self.server.answers[parts.path]
            self._answer(200, kind, make().encode())
        else:
            self._answer(404, "text/plain", b"there is nothing here: see /, /state and /metrics\n")

    @property
    def _name(self) -> str:
        """Of the cookie: browsers do not tell the ports of a machine apart."""
        return f"offbeat-{self.server.server_port}"

    def _for_this_machine(self) -> bool:
        """Whether the browser means this machine: else a page of somewhere else could have its name point to here, and read."""
        host = self.headers.get("Host", "")
        return re.sub(r":\d+$", "", host) in LOCAL

    def _known(self) -> bool:
        """Whether the client has shown that it knows the token: as a browser by the cookie, else as a bearer."""
        cookies = dict(part.strip().partition("=")[::2] for part in self.headers.get("Cookie", "").split(";"))
        if _same(cookies.get(self._name, ""), cookie(self.server.token)):
            return True
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return kind == "Bearer" and self._right(token)

    def _right(self, token: str) -> bool:
        return _same(token, self.server.token)

    def _refuse(self, why: str) -> None:
        self._answer(403, "text/plain", f"403: {why}\n".encode())

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", policy())
        self.end_headers()
        self.wfile.write(body)


@cache
def page() -> str:
    """The page: one file, which needs no other."""
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")


@cache
def policy() -> str:
    """What a browser may do for the page: run its own script, ask this server, and nothing else."""
    script = page().partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rest = "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; script-src 'sha256-{digest}'; {rest}"


def _same(one: str, other: str) -> bool:
    """Compare secrets in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


def _loopback(host: str) -> bool:
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")
