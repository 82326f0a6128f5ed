"""What a record says of other runs: cores that are shared, a fit that gives a cluster back, and predictions that are the truth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crew import Serving, labour

import offbeat as ob
from offbeat import cli
from offbeat.engines.clock import Clock
from offbeat.engines.processors import Machine, Machines
from offbeat.predict import Fit, advise, calibrated, cluster_of, fit, predict
from offbeat.runtime import meter
from offbeat.runtime.host import Terms
from offbeat.trace import Event, Incident, Load, Trace

SHARED = Machines(cores=2, handling=0.02, service=0.05)
MINE = ob.Cluster(2, ob.Gamma(1.0, 0.1), machines=SHARED)
METHODS = [
    ob.methods.DanaZero(0.01),
    ob.methods.AllReduce(),
    ob.methods.LocalSGD(period=4),
    ob.methods.SGP(),
    ob.methods.ADPSGD(),
    ob.methods.BackupWorkers(backups=1),
]


def record(method: ob.Method, cluster: ob.Cluster, gradients: int = 1500, seed: int = 0) -> Trace:
    return ob.simulate(method, ob.tasks.TimeOnly(1000), cluster, gradients=gradients, seed=seed).trace


def rate(trace: Trace) -> float:
    """Gradients per second, without the first half."""
    seconds = trace.column("seconds")
    half = len(seconds) // 2
    return (len(seconds) - 1 - half) / float(seconds[-1] - seconds[half])


def as_real(trace: Trace, **header: Any) -> Trace:
    """A simulated record as a real run would have made it: of the wire nothing is known but how long workers waited."""
    real = Trace({**trace.header, "engine": "runtime", "dtype": "torch.float32", "shard": [0, 1], **header})
    for entry in trace.entries():
        if isinstance(entry, Event):
            real.add(entry._replace(transit=0.0))
        else:
            real.note(entry)
    return real


# cores that are shared


@pytest.mark.parametrize(
    ("cores", "jobs", "others", "slower"), [(2, 1, 0, 1), (2, 2, 0, 1), (2, 4, 0, 2), (1, 3, 0, 3), (2, 2, 2, 2)]
)
def test_threads_share_cores_fairly(cores: int, jobs: int, others: int, slower: float) -> None:
    clock, ends = Clock(), []
    machine = Machine(clock, cores, others)
    for _ in range(jobs):
        machine.run(3.0, 1.0, lambda: ends.append(clock.now))
    while clock.step():
        pass
    assert ends == pytest.approx([3.0 * slower] * jobs, rel=1e-12)
    assert machine.used == pytest.approx(3.0 * jobs, rel=1e-12)
    assert machine.busy == pytest.approx(3.0 * (jobs + others), rel=1e-12)


def test_who_comes_later_slows_the_others_from_then_on() -> None:
    clock, ends = Clock(), {}
    machine = Machine(clock, 1, 0.0)
    machine.run(2.0, 1.0, lambda: ends.update(first=clock.now))
    clock.at(1.0, 1, lambda: machine.run(0.25, 1.0, lambda: ends.update(second=clock.now)))
    while clock.step():
        pass
    assert ends == pytest.approx({"second": 1.5, "first": 2.25})


def test_machines_with_cores_for_all_cost_nothing() -> None:
    method, plain = ob.methods.ASGD(0.01), ob.Cluster(3, ob.Gamma(1.0, 0.3))
    mine, other = (record(method, c, 200) for c in (plain, replace(plain, machines=Machines(cores=8))))
    assert other.column("worker").tolist() == mine.column("worker").tolist()
    assert other.column("seconds").tolist() == pytest.approx(mine.column("seconds").tolist(), rel=1e-9)
    assert other.column("lag").tolist() == mine.column("lag").tolist()


def test_a_server_serves_one_visit_at_a_time() -> None:
    cluster = ob.Cluster(8, ob.Fixed(1.0), machines=Machines(cores=100, workers=1, service=0.5))
    assert rate(record(ob.methods.ASGD(0.01), cluster)) == pytest.approx(2.0, rel=1e-6)


def test_a_worker_that_sleeps_leaves_its_core_to_others() -> None:
    cluster = ob.Cluster(4, ob.Gamma(1.0, 0.3), machines=Machines(cores=2, load=0.25))
    assert rate(record(ob.methods.ASGD(0.01), cluster)) > 3.5
    busy = replace(cluster, machines=Machines(cores=2))
    assert rate(record(ob.methods.ASGD(0.01), busy)) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_no_method_waits_for_ever_where_workers_come_and_go(method: ob.Method) -> None:
    events = (ob.Crash(1, 20.0), ob.Join(1, 40.0), ob.Leave(0, 60.0))
    trace = record(method, ob.Cluster(4, ob.Gamma(1.0, 0.2), events=events, machines=SHARED), 400)
    assert len(trace) == 400
    assert {i.what for i in trace.incidents} >= {"crashed", "joined", "left"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cores", 0),
        ("cores", math.inf),
        ("workers", 0),
        ("load", 0),
        ("handling", -1),
        ("service", math.nan),
        ("shards", 0),
        ("others", -1),
    ],
)
def test_bad_machines_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} = "):
        Machines(**{field: value})  # type: ignore[arg-type]


def test_machines_are_read_from_a_header() -> None:
    assert ob.names.read(repr(MINE)) == MINE


# the fit


@pytest.mark.parametrize(
    "machines",
    [
        SHARED,
        Machines(cores=4, handling=0.01, service=0.2),
        Machines(cores=2, workers=1, handling=0.01, service=0.02),
        Machines(cores=2, load=0.5, service=0.1),
        Machines(cores=4, load=2.0, service=0.1),
        Machines(cores=2, service=0.1, others=1.5),
    ],
)
@pytest.mark.parametrize("workers", [2, 3])
def test_a_record_gives_its_cluster_back(machines: Machines, workers: int) -> None:
    cluster = ob.Cluster(workers, ob.Gamma(1.0, 0.1), network=ob.Network(latency=0.01), machines=machines)
    for trace in (simulated := record(ob.methods.ASGD(0.01), cluster), as_real(simulated)):
        found = fit(trace)
        assert found.alone == pytest.approx(1.0, rel=0.05)
        assert found.rate == pytest.approx(rate(trace), rel=0.03)
        assert found.workers == workers
        mine = found.machines
        assert mine is not None
        assert (mine.cores, mine.workers) == (machines.cores, machines.workers)
        assert mine.load == pytest.approx(machines.load, rel=0.1)
        assert mine.handling == pytest.approx(machines.handling, rel=0.05, abs=1e-9)
        assert mine.service == pytest.approx(machines.service, rel=0.05)
        assert mine.others == pytest.approx(machines.others, abs=0.25)


def test_the_network_of_a_real_record_is_what_processors_do_not_explain() -> None:
    machines = Machines(cores=2, workers=1, handling=0.01, service=0.02)
    near = ob.Cluster(2, ob.Gamma(1.0, 0.3), network=ob.Network(latency=0.1), machines=machines)
    found = fit(as_real(record(ob.methods.ASGD(0.01), near)))
    assert found.network.latency == pytest.approx(0.1, rel=0.1)
    wire = replace(near, network=ob.Network(bandwidth=4e6))
    trace = ob.simulate(ob.methods.ASGD(0.01), ob.tasks.TimeOnly(100_000), wire, gradients=1500).trace
    assert fit(as_real(trace)).network.bandwidth == pytest.approx(4e6, rel=0.1)


def test_shards_count_together() -> None:
    parts = [as_real(record(ob.methods.ASGD(0.01), MINE), shard=[k, 2]) for k in (0, 1)]
    found, alone = fit(parts[0], parts[1:]), fit(as_real(record(ob.methods.ASGD(0.01), MINE)))
    assert found.machines is not None
    assert found.machines.shards == 2
    assert found.network.shards == 2
    assert (found.parameters, found.message) == (2 * alone.parameters, 2 * alone.message)


# predictions


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_prediction_is_the_truth(method: ob.Method) -> None:
    found = fit(as_real(record(method, MINE)))
    for workers in (2, 3, 4, 8):
        truth = record(method, replace(MINE, workers=workers), 400 * workers, seed=1)
        seen = predict(found, method.name, method, workers)
        assert seen.rate == pytest.approx(rate(truth), rel=0.05)
        assert seen.known is None
    assert predict(found, method.name, method, 2).rate == pytest.approx(found.rate, rel=0.05)


def test_a_calibrated_model_gives_the_record_itself() -> None:
    method = ob.methods.DanaZero(0.01)
    found = replace(fit(record(method, MINE)), gradients=100, seconds=100.0)  # slower than the model says
    corrected, plain = calibrated(found, method)
    assert predict(corrected, "", method, 2).rate == pytest.approx(1.0, rel=1e-9)
    assert plain.rate == predict(found, "", method, 2).rate > 1.5
    ratio = predict(corrected, "", method, 8).rate / predict(found, "", method, 8).rate
    assert ratio == pytest.approx(1.0 / plain.rate, rel=1e-9)
    elsewhere = ob.presets.ethernet_1g
    assert predict(corrected, "", method, 8, elsewhere) == predict(found, "", method, 8, elsewhere)


def test_a_simulated_record_is_a_check() -> None:
    found = fit(record(ob.methods.ASGD(0.01), MINE))
    assert found.known == MINE
    seen = predict(found, "asgd", ob.methods.ASGD(0.01), 32)
    assert seen.known == pytest.approx(seen.rate, rel=0.05)


def limit(found: Fit, method: ob.Method, workers: int) -> str:
    return predict(found, method.name, method, workers).limit


def test_what_limits_a_run_is_named() -> None:
    asgd, reduce = ob.methods.ASGD(0.01), ob.methods.AllReduce()
    found = fit(record(asgd, replace(MINE, network=ob.Network(latency=1e-6))))
    assert limit(found, asgd, 8) == "the machine's cores"
    apart = replace(found, machines=Machines(cores=4, workers=1, handling=0.01, service=0.05))
    assert limit(apart, asgd, 2) == "the workers' compute"
    assert limit(apart, asgd, 32) == "the server's processor"
    wire = replace(apart, network=ob.Network(bandwidth=4e3), machines=None)  # of messages of 4,000 bytes
    assert limit(wire, asgd, 32) == "the server's wire"
    assert limit(wire, reduce, 8) == "the wire"
    uneven = replace(wire, network=ob.Network(), speed=ob.Recorded(((1.0,), (3.0,))))
    assert limit(uneven, reduce, 4) == "the slowest worker"
    assert limit(uneven, ob.methods.SSP(), 4) == "the slowest worker"


def test_a_preset_takes_the_gradients_elsewhere() -> None:
    found = fit(record(ob.methods.ASGD(0.01), MINE))
    there = cluster_of(found, ob.methods.ASGD(), 8, ob.presets.ethernet_1g)
    assert there.network.bandwidth == ob.presets.ethernet_1g().network.bandwidth
    assert there.speed == found.speed
    assert there.machines is not None
    assert there.machines.workers == 1
    assert (
        predict(found, "asgd", ob.methods.ASGD(), 8, ob.presets.ethernet_1g).rate
        > predict(found, "asgd", ob.methods.ASGD(), 8).rate
    )


def test_costs_of_an_exchange_go_where_the_method_has_them() -> None:
    server = fit(record(ob.methods.ASGD(0.01), MINE))
    peers = cluster_of(server, ob.methods.AllReduce(), 4).machines
    assert peers is not None
    assert (peers.handling, peers.service) == (pytest.approx(0.07, rel=0.02), 0)
    reduced = fit(record(ob.methods.AllReduce(), MINE))
    served = cluster_of(reduced, ob.methods.ASGD(), 4).machines
    assert served is not None
    assert served.service > 0


# records that lack something


def test_records_that_say_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="no gradients"):
        fit(Trace({"engine": "runtime"}))
    with pytest.raises(ValueError, match="too short"):
        fit(record(ob.methods.ASGD(0.01), MINE, 30))
    old = Trace({"engine": "runtime"})
    for step in range(100):
        old.add(Event(float(step), 0, step, 0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="no seconds per gradient"):
        fit(old)


def test_what_makes_a_record_uncertain_is_said() -> None:
    one = fit(as_real(record(ob.methods.ASGD(0.01), replace(MINE, workers=1), 300)))
    assert any("one worker was recorded" in note for note in one.notes)
    bare = Trace({"engine": "runtime", "messages": "server", "method": "ASGD()"})
    for event in record(ob.methods.ASGD(0.01), MINE, 300):
        bare.add(event)
    found = fit(bare)
    assert found.machines is None
    assert any("no processor times" in note for note in found.notes)
    crowded = fit(as_real(record(ob.methods.ASGD(0.01), replace(MINE, machines=replace(SHARED, others=2.0)))))
    assert any("other processes" in note for note in crowded.notes)
    quick = ob.Cluster(2, ob.Gamma(0.01, 0.1), machines=Machines(cores=2))
    assert any("short" in note for note in fit(as_real(record(ob.methods.ASGD(0.01), quick))).notes)


def test_a_lost_worker_is_left_out() -> None:
    events = (ob.Crash(2, 300.0), ob.Join(2, 350.0))
    trace = as_real(
        record(ob.methods.ASGD(0.01), ob.Cluster(3, ob.Gamma(1.0, 0.1), events=events, machines=SHARED), 2000)
    )
    found = fit(trace)
    assert found.workers == 3
    assert any("lost 1 times" in note for note in found.notes)
    whole = fit(as_real(record(ob.methods.ASGD(0.01), replace(MINE, workers=3), 2000)))
    assert found.rate == pytest.approx(whole.rate, rel=0.03)


def test_a_beginning_that_is_slower_is_left_out() -> None:
    trace, slow = as_real(record(ob.methods.ASGD(0.01), MINE)), Trace()
    slow.header = trace.header
    end = 0.4 * trace[-1].seconds
    for entry in trace.entries():
        if isinstance(entry, Event) and entry.seconds < end and entry.step % 4:
            continue
        slow.note(entry) if not isinstance(entry, Event) else slow.add(entry)
    assert fit(slow).rate == pytest.approx(fit(trace).rate, rel=0.05)


def test_readings_of_a_new_process_are_no_growth_of_the_old_one() -> None:
    trace = as_real(record(ob.methods.ASGD(0.01), MINE))
    again, half = Trace(trace.header), trace[-1].seconds / 2
    for entry in trace.entries():
        if isinstance(entry, Load) and entry.worker == 1 and entry.seconds > half:
            entry = entry._replace(processor=entry.processor - half / 4)  # it has begun to count anew
        again.add(entry) if isinstance(entry, Event) else again.note(entry)
    mine, other = fit(trace).machines, fit(again).machines
    assert mine is not None
    assert other is not None
    assert other.handling == pytest.approx(mine.handling, rel=0.02)
    assert other.load == pytest.approx(mine.load, rel=0.02)


def test_readings_more_often_than_gradients_lose_nothing() -> None:
    trace = as_real(record(ob.methods.ASGD(0.01), MINE))
    often = Trace(trace.header)
    for entry in trace.entries():
        if isinstance(entry, Load):
            often.note(entry._replace(processor=entry.processor - 1e-3))
        often.add(entry) if isinstance(entry, Event) else often.note(entry)
    mine, other = fit(trace).machines, fit(often).machines
    assert mine is not None
    assert other is not None
    assert other.others == mine.others == 0
    assert other.service == pytest.approx(mine.service, rel=0.02)


# advice


def test_advice_prefers_speed_and_then_what_is_not_stale() -> None:
    found = fit(record(ob.methods.ASGD(0.01), MINE))
    even = [a.candidate.name for a in advise(found, 2)]
    assert even[0] == "all-reduce"
    slow = replace(found, machines=None, speed=ob.Recorded(((1.0,), (1.0,), (1.0,), (8.0,))), network=ob.Network())
    assert advise(slow, 4)[0].candidate.name == "backup-workers(backups=1)"
    many = advise(replace(found, machines=None, network=ob.Network()), 32)
    assert [a.candidate.name for a in many][-1] == "dana-zero"
    assert "beyond" in many[-1].why
    assert any(a.measured for a in advise(found, 2))
    assert not any(a.measured for a in advise(found, 4))


# the processor times of a real run


def test_a_load_survives_the_file(tmp_path: Path) -> None:
    trace = Trace({"engine": "runtime"})
    load = Load(1.5, -1, 3, 2.0, 1.0, 0.5, math.nan, math.nan, 2, "here")
    trace.note(load)
    trace.write(tmp_path / "trace.jsonl")
    (back,) = Trace.read(tmp_path / "trace.jsonl").loads
    assert str(back) == str(load)


def test_growth_is_of_counters_that_come_and_go() -> None:
    growth = meter.Growth()
    assert growth.add({1: 2.0, 2: 3.0}) == 5.0
    assert growth.add({1: 2.5}) == 5.5
    assert growth.add({1: 2.5, 2: 1.0}) == 6.5


def test_a_load_that_makes_no_sense_is_left_out() -> None:
    said = meter.Meter().read(3)
    assert said is not None
    assert isinstance(meter.load(1.0, 0, json.loads(json.dumps(said))), Load)
    wrong = {"gradients": "3", "wall": -1, "processor": None, "cores": 1.5, "machine": 7, "busy": [], "queued": 1e99}
    for name, value in wrong.items():
        assert meter.load(1.0, 0, {**said, name: value}) is None, name
    for other in (None, 3, {}, {**said, "more": 1}, {**said, "seconds": 1}):
        assert meter.load(1.0, 0, other) is None or other == {**said, "seconds": 1}


@pytest.mark.parametrize("method", [ob.methods.DanaZero(0.01)], ids=lambda m: m.name)
def test_a_real_run_says_what_it_has_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: ob.Method) -> None:
    monkeypatch.setattr(meter, "EVERY", 0.02)
    serving = Serving(Terms(method, gradients=300, workers=2), tmp_path)
    labour([serving.place(i) for i in range(2)], ob.tasks.Quadratic(), seconds=(0.005,))
    serving.join()
    trace = serving.trace() if serving.thread.is_alive() else Trace.read(tmp_path / "trace.jsonl")
    assert {load.worker for load in trace.loads} == {-1, 0, 1}
    for load in trace.loads:
        assert load.processor > 0
        assert load.cores >= 1
    found = fit(trace)
    assert found.machines is not None
    assert found.workers == 2
    assert predict(found, "dana-zero", method, 4).rate > 0


# the commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")
    folder = tmp_path / "run"
    folder.mkdir()
    trace = record(ob.methods.ASGD(0.01), MINE, 400)
    trace.write(folder / "trace.jsonl")
    (tmp_path / "own").mkdir()
    trace.header["method"] = "MyMethod(lr=0.1)"
    trace.write(tmp_path / "own" / "trace.jsonl")
    return folder


def test_predict_prints_a_table_and_leaves_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "run", "--workers", "4", "8", "--methods", "asgd", "local-sgd(period=4)"]) == 0
    said = capsys.readouterr().out
    assert "local-sgd(period=4)" in said
    assert "check:" in said
    assert (run / "predict.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((run / "predict.json").read_text())
    assert [(p["method"], p["workers"]) for p in kept["predictions"]] == [
        (m, n) for m in ("asgd", "local-sgd(period=4)") for n in (4, 8)
    ]


def test_advise_says_what_is_computed_and_what_is_a_rule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "run", "--workers", "4", "--preset", "ethernet-10g"]) == 0
    said = capsys.readouterr().out
    assert " 1. " in said
    assert said.count("computed:") == said.count("Rule of thumb:") == 10
    assert cli.main(["advise", "run/trace.jsonl"]) == 0
    assert "asgd  measured:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["predict", "nowhere"], "nowhere"),
        (["predict", "."], "holds no trace"),
        (["predict", "run", "--workers", "0"], "workers"),
        (["predict", "run", "--methods", "dana-zer"], "dana-zero"),
        (["predict", "run", "--preset", "ethernet"], "ethernet-1g"),
        (["advise", "run", "--workers", "0"], "workers"),
        (["advise", "own"], "--import"),
    ],
)
def test_bad_inputs_are_told(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], names: str) -> None:
    try:
        status = cli.main(argv)
    except SystemExit as end:  # tyro's own errors
        status = end.code  # type: ignore[assignment]
    assert status == 2
    said = capsys.readouterr()
    assert names in said.err + said.out
    assert "Traceback" not in said.err
    assert not (run / "predict.json").exists()


def test_a_method_that_cannot_have_so_many_workers_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "run", "--workers", "2", "--methods", "backup-workers(backups=3)", "asgd"]) == 0
    said = capsys.readouterr()
    assert "backup-workers(backups=3) with 2 workers cannot run" in said.err
    assert "asgd" in said.out


def test_workers_that_were_lost_are_counted_from_incidents() -> None:
    trace = record(ob.methods.ASGD(0.01), MINE, 100)
    trace.note(Incident(trace[-1].seconds, 0, "left"))
    assert fit(trace).workers == 2
