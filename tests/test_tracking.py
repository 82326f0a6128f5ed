"""Trackers get the figures of a run, each with its own package; and what they do wrong is told, and goes no further."""

from __future__ import annotations

import csv
import json
import logging
import math
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crew import until

import offbeat as ob
from offbeat.cli import main
from offbeat.trace import Evaluation, Event, Incident, line
from offbeat.tracking import Tracker, feed, find
from offbeat.tracking.feed import Feed, Rows

ABOUT = {"method": "DanaZero(lr=0.05)", "workers": 2, "seed": 3}
ENTRIES: list[dict[str, Any]] = [
    json.loads(line({"method": ABOUT["method"]})),
    json.loads(line(Incident(0.0, 0, "joined"))),
]
for k in range(1500):
    loss, gap = math.nan if k % 7 == 3 else 1 / (k + 1), math.nan if k < 5 else 0.1
    entry = Event(k / 10, 0, k, k % 3, gap, math.nan, loss, extra={"lr": 0.5} if k > 100 else {})
    ENTRIES.append(json.loads(line(entry)))
    if k == 1000:
        ENTRIES.append(json.loads(line(Evaluation(100.0, 1001, {"accuracy": 0.75}))))


EVALUATED = next(k for k, entry in enumerate(ENTRIES) if "evaluation" in entry)


class Mine(Tracker):
    """One of a user: it fails in the ways that a test wants."""

    made: ClassVar[list[Mine]] = []
    fails: ClassVar[str] = ""
    held: ClassVar[threading.Event] = threading.Event()

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        if self.fails == "init":
            raise RuntimeError("no network\nand more")
        self.name, self.parameters = name, dict(parameters)
        self.rows: list[tuple[Mapping[str, float], int, float]] = []
        self.closed = False
        self.made.append(self)

    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        if self.fails == "log":
            raise OSError(28, "No space left on device")
        if self.fails == "hang":
            self.held.wait(60)
        self.rows.append((figures, gradients, seconds))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "made", [])
    monkeypatch.setattr(Mine, "held", threading.Event())
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def fed(folder: Path, *names: str, entries: Sequence[dict[str, Any]] = ENTRIES) -> None:
    """A whole run, by pieces, to trackers by name."""
    one = Feed({name: find(name) for name in names}, folder, "a run", ABOUT)
    for k in range(0, len(entries), 100):
        one.take(entries[k : k + 100])
    one.close()


# rows


def test_rows_are_means_of_the_gradients_between_them() -> None:
    """All of them at first, and one for each 500th part of the run later."""
    rows = [row for row in Rows().take(ENTRIES) if "loss" in row.figures or row.gradients < 900]
    assert [row.gradients for row in rows[:5]] == [1, 2, 3, 4, 5]
    last = [row for row in rows if row.gradients > 1100][:2]
    count = last[1].gradients - last[0].gradients
    assert count == 2
    ks = range(last[0].gradients, last[1].gradients)
    assert last[1].figures["loss"] == pytest.approx(
        sum(1 / (k + 1) for k in ks if k % 7 != 3) / sum(k % 7 != 3 for k in ks)
    )
    assert last[1].figures["lag"] == sum(k % 3 for k in ks) / count
    assert last[1].figures["gradients_per_second"] == pytest.approx(10)
    assert last[1].figures["lr"] == 0.5
    assert last[1].figures["workers_alive"] == 1
    assert "gap" not in rows[0].figures  # which is not known
    assert all(math.isfinite(value) for row in rows for value in row.figures.values())


def test_rows_go_on_where_the_trace_begins_anew() -> None:
    """A server goes on from a snapshot: what it has lost is not told twice, and nothing goes back."""
    rows, once = Rows(), Rows()
    got = list(rows.take(ENTRIES[:702]))
    rows.again()
    got += [*rows.take(ENTRIES[:402]), *rows.take(ENTRIES[402:]), *rows.rest()]
    assert got == [*once.take(ENTRIES), *once.rest()]
    told = [row.gradients for row in got]
    assert told == sorted(told)
    assert len(told) == len(set(told))
    assert told[-1] == 1500


# the trackers of the library


def test_csv(tmp_path: Path) -> None:
    fed(tmp_path, "csv")
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["gradients"]) for row in rows[:3]] == [1, 2, 3]
    assert float(rows[0]["loss"]) == 1.0
    assert [float(row["evaluation/accuracy"]) for row in rows if row["evaluation/accuracy"]] == [0.75]
    assert float(rows[-1]["lr"]) == 0.5
    assert rows[0]["lr"] == ""
    with open(tmp_path / "parameters.csv", newline="") as file:
        assert dict(csv.reader(file))["method"] == ABOUT["method"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second time takes the place of the first
        fed(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = events.Scalars("loss")
    assert (losses[0].step, losses[0].value) == (1, 1.0)
    assert [(one.step, one.value) for one in events.Scalars("evaluation/accuracy")] == [(1001, 0.75)]
    assert len({one.step for one in losses}) == len(losses)
    assert b"DanaZero" in events.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    fed(tmp_path, "mlflow", entries=[*ENTRIES[:30], ENTRIES[EVALUATED]])  # each takes a moment
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("offbeat")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in ABOUT.items()}
    assert run.data.metrics["evaluation/accuracy"] == 0.75
    history = client.get_metric_history(run.info.run_id, "loss")
    assert (history[0].step, history[0].value) == (1, 1.0)


def records(data: bytes) -> Iterator[bytes]:
    """What is in the file of an offline run, which is laid out as a log of LevelDB: blocks of 32 KiB, in them pieces of records, each
    with a checksum, a length and whether it is whole (1), or the first (2), a middle (3) or the last one (4)."""
    place, whole = 7, b""  # after the name of the format
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7]) if rest >= 7 else (0, 0, 0)
        if kind == 0:
            place += rest
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_is_offline_unless_the_user_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    fed(tmp_path, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        history.append(
            {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        )
    history = [row for row in history if row]
    assert (history[0]["gradients"], history[0]["loss"]) == (1, 1.0)
    assert [row["evaluation/accuracy"] for row in history if "evaluation/accuracy" in row] == [0.75]
    assert {name: config[name] for name in ABOUT} == ABOUT


# those of users, and those that fail


def test_a_tracker_of_the_user_is_named_by_its_module(tmp_path: Path) -> None:
    fed(tmp_path, f"{__name__}:Mine")
    (mine,) = Mine.made
    assert (mine.name, mine.parameters, mine.closed) == ("a run", ABOUT, True)
    assert mine.rows[0][1:] == (1, 0.0)
    assert mine.rows[-1][1] == 1500


def test_trackers_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="there is no such tracker; choose of csv, tensorboard, wandb, mlflow, or give MODULE:CLASS"
    ):
        find("tensorbord")
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        find("nowhere:Tracker")
    with pytest.raises(ValueError, match="no attribute 'Nothing'"):
        find(f"{__name__}:Nothing")
    with pytest.raises(ValueError, match="must be a class derived from"):
        find("pathlib:Path")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--track wandb needs wandb: pip install 'offbeat\[wandb\]'"):
        find("wandb")


@pytest.mark.parametrize(
    ("fails", "word"),
    [("init", "could not begin (no network): it gets nothing"), ("log", "fails ([Errno 28] No space left on device)")],
)
def test_a_tracker_that_fails_is_told_once_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str, word: str
) -> None:
    monkeypatch.setattr(Mine, "fails", fails)
    fed(tmp_path, f"{__name__}:Mine", "csv")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert word in caplog.text
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) > 500


def test_a_tracker_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Mine, "fails", "hang")
    monkeypatch.setattr(feed, "WAITING", 50)
    monkeypatch.setattr(feed, "CLOSING", 0.2)
    one = Feed({"mine": Mine, "csv": find("csv")}, tmp_path, "a run", ABOUT)
    try:
        one.take(ENTRIES[:400])
        one.close()
        said = [record.getMessage() for record in caplog.records]
        assert "tracker mine is too slow: 50 rows wait for it, and others are dropped" in said
        assert sum("tracker mine" in text for text in said) == 2
        assert "tracker mine is not done after 0.2 s: it is left, and may lack the last figures" in said
    finally:
        Mine.held.set()


# from the command line


def test_a_run_that_is_over_is_told_to_a_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ob.simulate(ob.methods.DanaZero(), ob.tasks.Quadratic(), ob.Cluster(3), gradients=300)
    run.trace.write(tmp_path / "trace.jsonl")
    assert main(["attach", str(tmp_path), "--track", "csv", f"{__name__}:Mine"]) == 0
    until(lambda: Mine.made[0].closed, "its end")
    assert Mine.made[0].rows[-1][1] == 300
    assert "DanaZero" in Mine.made[0].parameters["method"]
    assert "is over: 300 gradients" in capsys.readouterr().err
    simulate = ["simulate", "--task", "quadratic", "--gradients", "100", "--out", str(tmp_path / "s")]
    assert main([*simulate, "--track", f"{__name__}:Mine"]) == 0
    assert (Mine.made[1].closed, Mine.made[1].rows[-1][1]) == (True, 100)
    assert any("evaluation/loss" in figures for figures, _, _ in Mine.made[1].rows)
    assert main([*simulate[:-1], str(tmp_path / "t"), "--track", "tensorbord"]) == 2
    assert not (tmp_path / "t").exists()
    assert main(["attach", str(tmp_path / "none")]) == 2
    assert "holds no run: it is not there; give the folder" in capsys.readouterr().err
