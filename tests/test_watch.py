"""Watching a run from its folder: what is read as it grows, what it adds up to, and to whom it is served."""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from crew import until
from prometheus_client.parser import text_string_to_metric_families

import offbeat as ob
from offbeat.trace import Evaluation, Event, Incident, line
from offbeat.watch import web
from offbeat.watch.curve import BINS, Curve, Sums
from offbeat.watch.follow import Follower, Tail
from offbeat.watch.picture import left, metrics, picture
from offbeat.watch.status import STALE, Status, write
from offbeat.watch.view import DRAWN, EVALUATIONS, HAPPENED, View
from offbeat.watch.watcher import Watcher, check

TOKEN = "a token that is a secret"


def gradient(seconds: float, worker: int = 0, step: int = 0, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"lag": 1, "gap": 0.5, "normalised_gap": math.nan, "sent": 8.0} | more
    return dict(json.loads(line(Event(seconds, worker, step, loss=loss, **settings))))


def incident(seconds: float, worker: int, what: str, lost: int = 0) -> dict[str, Any]:
    return dict(json.loads(line(Incident(seconds, worker, what, lost))))


def viewed(*entries: dict[str, Any]) -> View:
    view = View()
    for entry in entries:
        view.take(entry)
    return view


# what is read


def test_whole_lines_are_read_once_as_they_come(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log")
    assert tail.read() == []  # there is no file yet
    with open(tail.path, "wb", buffering=0) as file:
        file.write(b"one\ntwo\nthr")
        assert tail.read() == [b"one", b"two"]
        assert tail.read() == []
        file.write(b"ee\n")
        assert tail.read() == [b"three"]
        assert not tail.again


@pytest.mark.parametrize("grown", [b"", b"x" * 1000 + b"\n"], ids=["shorter", "longer"])
def test_a_file_that_was_cut_is_read_anew(tmp_path: Path, grown: bytes) -> None:
    """As when a server goes on from a snapshot: even where the file is longer than before by the time that it is looked at."""
    tail = Tail(tmp_path / "log")
    tail.path.write_bytes(b"one\ntwo\nthree\n")
    assert len(tail.read()) == 3
    tail.path.write_bytes(b"one\nother\n" + grown)
    assert tail.read()[:2] == [b"one", b"other"]
    assert tail.again
    assert tail.read() == []
    assert not tail.again


def test_a_large_file_is_read_in_pieces_and_all_of_it(tmp_path: Path) -> None:
    tail, lines = Tail(tmp_path / "log"), [b"%d" % k * 50 for k in range(60_000)]
    lines[7] = b"long" * 1_000_000
    tail.path.write_bytes(b"\n".join(lines) + b"\n")
    pieces = []
    while piece := tail.read():
        pieces.append(piece)
    assert [one for piece in pieces for one in piece] == lines
    assert len(pieces) > 10


def test_lines_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    good = [json.dumps(gradient(k)).encode() for k in range(3)]
    (tmp_path / "trace.jsonl").write_bytes(
        b"\n".join([good[0], b'{"deeds": 1}', b"\0\0\0", b"7", good[1], b"{", good[2]]) + b"\n"
    )
    assert [entry["seconds"] for entry in Follower(tmp_path).read()] == [0, 1, 2]


# what it comes to


def test_a_view_of_a_simulated_run_is_what_its_trace_says(tmp_path: Path) -> None:
    """Gradients, workers, losses, lags and what happened, by another way of adding up."""
    cluster = ob.Cluster(3, ob.Fixed(1.0), (ob.Crash(1, 20.5), ob.Join(1, 30.5)))
    run = ob.simulate(ob.methods.DanaZero(), ob.tasks.Quadratic(), cluster, gradients=200)
    run.trace.write(tmp_path / "trace.jsonl")
    follower, view = Follower(tmp_path), View()
    while entries := follower.read():
        for entry in entries:
            view.take(entry)
    steps, losses = run.trace.column("worker"), run.trace.column("loss")
    assert view.gradients == 200
    assert {n: worker.gradients for n, worker in view.workers.items()} == {n: int((steps == n).sum()) for n in range(3)}
    assert view.alive == [0, 1, 2]
    assert [(life.since, life.until, life.how) for life in view.workers[1].lives] == [
        (0.0, 20.5, "crashed"),
        (30.5, None, ""),
    ]
    bins = view.curve.until(view.seconds)
    assert sum(one.gradients for one in bins) == 200
    assert sum(one.loss for one in bins) == pytest.approx(float(losses.sum()))
    assert max(one.most for one in bins) == int(run.trace.column("lag").max())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_a_curve_keeps_all_sums_in_few_bins_however_long_it_is(scale: float) -> None:
    draw, curve, events = random.Random(1), Curve(), []
    for _ in range(5000):
        events.append((draw.random() * scale, draw.choice([None, draw.random()]), draw.randrange(9)))
    for seconds, loss, lag in sorted(events, key=lambda event: event[0]):
        curve.at(seconds).add(loss, lag, None)
    bins = curve.until(scale)
    assert len(bins) <= BINS
    assert sum(one.gradients for one in bins) == 5000
    assert sum(one.loss for one in bins) == pytest.approx(sum(loss for _, loss, _ in events if loss is not None))
    own = Sums()
    for seconds, loss, lag in events:
        if int(seconds / curve.width) == len(bins) // 3:
            own.add(loss, lag, None)
    third = bins[len(bins) // 3]
    assert (third.gradients, third.losses, third.lag, third.most) == (own.gradients, own.losses, own.lag, own.most)


def test_a_worker_that_falls_silent_slows_down_and_one_that_dies_has_no_rate() -> None:
    view = viewed(incident(0, 0, "joined"), *(gradient(k / 10, 0, k) for k in range(50)))
    assert view.rate(4.9) == pytest.approx(10)
    assert view.rate(4.95) == pytest.approx(10)  # nothing is late yet
    assert view.rate(30) < 2
    view.take(incident(5.0, 0, "crashed", 1))
    assert (view.rate(5.0), view.alive, view.crashes) == (0, [], 1)
    view.take(incident(6.0, 0, "joined"))
    assert view.alive == [0]
    assert view.rate(6.0) == 0  # its earlier life does not count


def test_what_is_kept_of_a_long_run_is_bounded() -> None:
    view = View()
    for k in range(3000):
        view.take(incident(k, k % 40, "joined"))
        view.take(gradient(k, k % 40, k))
        view.take(incident(k + 0.5, k % 40, "crashed"))
        view.take(dict(json.loads(line(Evaluation(k, k, {"accuracy": k / 3000})))))
    assert len(view.happened) == HAPPENED
    assert len(view.evaluations) <= EVALUATIONS
    assert view.evaluations[-1][1] == 2999
    text = json.dumps(picture(view, Status({"seconds": 3000}), "run"))
    assert len(text) < 250_000
    assert list(json.loads(text)["curves"]) == ["all"]  # more workers than can be told apart
    few = picture(viewed(*(gradient(1, n) for n in range(DRAWN))), Status(), "run")
    assert len(few["curves"]) == 1 + DRAWN


def test_a_picture_has_no_number_that_json_has_not() -> None:
    view = viewed(gradient(1.0, loss=math.nan, gap=math.nan), gradient(2.0, loss=math.inf, gap=math.nan))
    about = picture(view, Status({"seconds": 2.0, "total": 10}), "run")
    json.dumps(about, allow_nan=False)
    assert (about["loss"], about["workers"][0]["gap"]) == (None, None)


# how the run is


def test_phases_of_a_run(tmp_path: Path) -> None:
    assert Status.read(tmp_path).phase == "starting"
    write(tmp_path, {"seconds": 3.0, "ending": "", "over": False, "total": 10})
    status = Status.read(tmp_path)
    assert (status.phase, status.total) == ("running", 10)
    assert status.seconds == pytest.approx(3.0, abs=5)
    assert Status(status.said | {"ending": "the model is written"}).phase == "ending: the model is written"
    assert Status(status.said, age=STALE + 5).phase.startswith("silent: the server has said nothing for 15 s")
    assert Status(status.said | {"over": True}, age=1e6).phase == "over"
    (tmp_path / "status.json").write_text("{")
    assert Status.read(tmp_path).phase == "starting"
    (tmp_path / "trace.jsonl").touch()
    assert Status.read(tmp_path).over  # a simulation, whose trace is written at its end


def test_how_long_it_takes() -> None:
    view = viewed(incident(0, 0, "joined"), *(gradient(k / 10, 0, k) for k in range(50)))
    said = {"seconds": 4.9, "total": 250, "minibatches": 50}
    assert left(view, Status(said)) == pytest.approx(20)
    assert left(view, Status(said | {"minibatches": 100})) == pytest.approx(7.5)  # each gradient is of two
    assert math.isnan(left(view, Status(said | {"total": None})))
    assert math.isnan(left(view, Status(said | {"over": True})))


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: it has no trace\.jsonl; give the folder that"):
        check(tmp_path)
    with pytest.raises(ValueError, match="it is not there"):
        check(tmp_path / "nowhere")
    (tmp_path / "logs").mkdir()
    check(tmp_path)


def test_nothing_that_watches_imports_torch() -> None:
    code = "import sys, offbeat.watch.process, offbeat.watch.beside; sys.exit('torch' in sys.modules)"
    lazy = "import sys, offbeat; sys.exit('torch' in sys.modules)"
    if subprocess.run([sys.executable, "-c", lazy], timeout=300).returncode:
        pytest.skip("the package itself imports torch")
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


# metrics


def test_metrics_are_what_prometheus_reads() -> None:
    view = viewed(
        incident(0, 0, "joined"),
        incident(0, 1, "joined"),
        *(gradient(k / 10, k % 2, k // 2, loss=0.25) for k in range(40)),
        incident(4.0, 1, "crashed"),
        incident(4.1, 1, "joined"),
        dict(json.loads(line(Evaluation(4.0, 40, {'top-"1"\\': 0.5, "bad": math.nan})))),
    )
    families = {
        family.name: family for family in text_string_to_metric_families(metrics(view, Status({"seconds": 4.1})))
    }
    value = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert value["offbeat_gradients_total",] == 40
    assert value["offbeat_loss",] == 0.25
    assert value["offbeat_workers_alive",] == 2
    assert value["offbeat_worker_restarts_total", "1"] == value["offbeat_worker_crashes_total", "1"] == 1
    assert value["offbeat_worker_gradients_total", "0"] == 20
    assert value["offbeat_worker_sent_bytes_total", "0"] == 160
    assert (value["offbeat_worker_lag", "1"], value["offbeat_worker_gap", "1"]) == (1, 0.5)
    assert value["offbeat_evaluation", 'top-"1"\\'] == 0.5
    assert value["offbeat_run_over",] == 0
    assert value["offbeat_gradients_per_second",] == pytest.approx(view.rate(4.0))
    assert families["offbeat_gradients"].type == "counter"
    assert families["offbeat_worker_gap"].type == "gauge"
    assert all(family.documentation.endswith(".") for family in families.values())


# who may look


class Served:
    """A watcher of a folder with a page, in a thread."""

    def __init__(self, folder: Path, page: str = "0", token: str = "") -> None:
        listener = web.listen(page, token)
        self.port = listener.getsockname()[1]
        self.watcher, self.over = Watcher(folder, listener, token), threading.Event()
        self.thread = threading.Thread(target=self.watcher.run, args=(lambda: not self.over.is_set(),))
        self.thread.start()

    def get(self, path: str = "/state", **headers: str) -> tuple[int, str, dict[str, str]]:
        link = HTTPConnection("127.0.0.1", self.port, timeout=30)
        link.request("GET", path, headers=headers)
        answer = link.getresponse()
        text = answer.read().decode()
        link.close()
        return answer.status, text, dict(answer.getheaders())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def serve(*args: str) -> Served:
        made.append(Served(tmp_path, *args))
        return made[-1]

    yield serve
    for one in made:
        one.over.set()
        one.thread.join(120)
        assert not one.thread.is_alive()


def test_the_page_follows_a_run_as_it_grows_and_begins_anew(served: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    run = served()
    assert json.loads(run.get()[1])["phase"] == "starting"
    lines = [line({"method": "ASGD()"}), line(Incident(0.0, 0, "joined")), json.dumps(gradient(1.0))]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines) + "\n")
    write(tmp_path, {"seconds": 1.0, "ending": "", "launched": 2, "over": False, "total": 9, "minibatches": 1})
    (tmp_path / "logs" / "launch.log").write_text("10:00:00 worker 1 was killed\n")

    def told(**expected: Any) -> bool:
        about = json.loads(run.get()[1])
        return all(about[name] == value for name, value in expected.items())

    until(lambda: told(gradients=1, method="ASGD()", alive=1, launched=2, total=9), "the first gradient")
    until(lambda: told(log=["10:00:00 worker 1 was killed"]), "the launcher's word")
    with open(tmp_path / "trace.jsonl", "a") as file:
        file.write(json.dumps(gradient(2.0, 0, 1)) + "\n" + line(Incident(2.5, 0, "crashed", 1)) + "\n")
    until(lambda: told(gradients=2, alive=0, crashes=1), "the loss")
    (tmp_path / "trace.jsonl").write_text("\n".join([*lines[:2], json.dumps(gradient(1.5))]) + "\n")
    until(lambda: told(gradients=1, alive=1, crashes=0), "the second beginning")
    write(tmp_path, {"seconds": 1.0, "over": True})
    until(lambda: told(phase="over", over=True), "its end")


def test_on_this_machine_no_token_is_needed_but_a_browser_must_mean_this_machine(served: Callable[..., Served]) -> None:
    """Else a page of somewhere else could point its own name here, and read."""
    run = served()
    status, text, headers = run.get("/")
    assert (status, text) == (200, web.page())
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert run.get("/metrics")[2]["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert run.get("/state", Host="localhost:9999")[0] == 200  # a port that is forwarded
    status, text, _ = run.get("/state", Host="evil.example")
    assert (status, text) == (403, f"403: this page is for this machine only, as http://127.0.0.1:{run.port}/\n")


@pytest.mark.parametrize("path", ["/trace.jsonl", "/../../etc/passwd", "/%2e%2e/secret", "/page.html", "/state/"])
def test_there_are_three_paths_and_no_files(served: Callable[..., Served], path: str) -> None:
    assert served().get(path)[0] == 404


def test_beyond_this_machine_the_token_is_asked_for_once(served: Callable[..., Served]) -> None:
    run = served("0.0.0.0:0", TOKEN)
    for path in ("/", "/state", "/metrics", "/nothing", "/state?token=wrong", "/state?token="):
        status, text, headers = run.get(path)
        assert (status, "open it once with ?token=" in text, "Set-Cookie" in headers) == (403, True, False), path
    status, _, headers = run.get(f"/?token={TOKEN.replace(' ', '%20')}")
    assert (status, headers["Location"]) == (303, "/")
    cookie, *rest = headers["Set-Cookie"].split("; ")
    assert TOKEN not in cookie  # who reads it cannot join the run
    assert {"HttpOnly", "SameSite=Strict"} <= set(rest)
    assert run.get("/state", Cookie=f"other=1; {cookie}")[0] == 200
    assert run.get("/state", Cookie=cookie[:-1])[0] == 403
    assert run.get("/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert run.get("/metrics", Authorization="Bearer wrong")[0] == 403
    assert run.get("/metrics", Authorization=f"Basic {TOKEN}")[0] == 403


def test_where_a_page_cannot_be() -> None:
    for token in ("", "short"):
        with pytest.raises(
            ValueError, match="can be reached from other machines: set OFFBEAT_TOKEN to a secret of 16 bytes"
        ):
            web.listen("0.0.0.0:0", token)
    for bad in ("", "web", "70000", ":80", "a:b:80", "-1"):
        with pytest.raises(ValueError, match="must be a port, such as 8000"):
            web.address(bad)
    assert web.address("[::1]:80") == ("[::1]", 80)
    with contextlib.closing(web.listen("0", "")) as taken, pytest.raises(ValueError, match="choose another port"):
        web.listen(str(taken.getsockname()[1]), "")


def test_those_that_hold_connections_are_hung_up_on(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow ones after a while, even where they send a byte now and then; and no more than so many are let in."""
    monkeypatch.setattr(web, "PATIENCE", 1.0)
    run = served()
    idle = [socket.create_connection(("127.0.0.1", run.port), 30) for _ in range(web.AT_ONCE + 5)]
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.1):
                idle[0].sendall(b"G")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        for one in idle:
            with contextlib.suppress(ConnectionError):
                assert one.recv(100) == b""
        assert run.get()[0] == 200
    finally:
        over.set()
        thread.join(120)
        for one in idle:
            one.close()


def test_other_methods_are_not_answered(served: Callable[..., Served]) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{served().port}/state", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(request, timeout=30)
    assert told.value.code == 501
    told.value.close()


def test_a_page_with_many_viewers_is_made_once_for_all(served: Callable[..., Served], tmp_path: Path) -> None:
    run = served()
    (tmp_path / "trace.jsonl").write_text(line({"method": "ASGD()"}) + "\n" + json.dumps(gradient(1.0)) + "\n")
    until(lambda: json.loads(run.get()[1])["gradients"], "the gradient")
    before = time.monotonic()
    texts = [run.get()[1] for _ in range(20)]
    assert len(set(texts)) <= 2 + 2 * (time.monotonic() - before)
