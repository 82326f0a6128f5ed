"""The scripts in experiments/: each runs to its end with tiny settings, and writes what it says; their formulas hold."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import offbeat as ob
from offbeat.experiment import Comparison
from offbeat.tasks import DataDiffers

FOLDER = Path(__file__).parents[1] / "experiments"
pytestmark = pytest.mark.filterwarnings(f"ignore::{DataDiffers.__module__}.{DataDiffers.__name__}")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of MNIST's shape with a hundred random images each, so that nothing has to be skipped for want of data."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = bytes(torch.randint(256, (100 * 784,), generator=generator).tolist())
        labels = bytes(torch.randint(10, (100,), generator=generator).tolist())
        for name, content in (
            (f"{part}-images-idx3-ubyte", struct.pack(">4I", 0x803, 100, 28, 28) + pixels),
            (f"{part}-labels-idx1-ubyte", struct.pack(">2I", 0x801, 100) + labels),
        ):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path / "data"))


def run(name: str, out: Path, line: str, monkeypatch: pytest.MonkeyPatch, jobs: bool = True) -> ModuleType:
    """Run the script ``name`` as from a command line; the script."""
    script = importlib.import_module(name)
    argv = [f"{name}.py", "--out", str(out), *(["--jobs", "1"] if jobs else []), *line.split()]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    return script


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_all_scripts_are_tested() -> None:
    tests = "".join(globals())
    assert all(f"test_{path.stem}" in tests for path in FOLDER.glob("*.py"))


# contention


def test_contention_has_the_rates_that_arithmetic_says(monkeypatch, tmp_path, capsys) -> None:
    script = run("contention", tmp_path, "--workers 1 2 64", monkeypatch, jobs=False)
    rates = results(tmp_path)["gradients_per_second"]
    assert rates.keys() == script.SETUPS.keys()
    for name, row in rates.items():
        assert row.keys() == {"1", "2", "64"}
        assert all(abs(script.deviation(name, int(n), measured)) < 0.01 for n, measured in row.items())
    assert is_picture(tmp_path / "contention.png")
    said = capsys.readouterr().out
    assert all(f"\n{name}: {setup.says}\n" in said for name, setup in script.SETUPS.items())


def test_contentions_formulas(monkeypatch) -> None:
    script = importlib.import_module("contention")
    c, latency, size, bandwidth = script.C, script.L, script.S, script.B
    formulas = {name: setup.formula for name, setup in script.SETUPS.items()}
    assert script.served(1, math.inf) == pytest.approx(1 / (c + 2 * latency + 2 * size / bandwidth))
    assert script.served(10**6, 312.5) == 312.5
    assert formulas["server"](10**6) == bandwidth / size == 2 * formulas["server, half duplex"](10**6)
    assert formulas["server, 4 shards"](10**6) == 4 * formulas["server"](10**6)
    assert all(formulas[name](1) == pytest.approx(1 / c) for name in ("push gossip", "SGP", "all-reduce"))
    assert script.deviation("push gossip", 2, 1.01 * 2 / c) == pytest.approx(1.0)


# straggler


def test_straggler_writes_both_comparisons_and_its_picture(monkeypatch, tmp_path) -> None:
    line = "--gradients 48 --evaluations 4 --seeds 0 1 --target 0.3"
    script = importlib.import_module("straggler")
    monkeypatch.setattr(script, "METHODS", ("all-reduce", "asgd"))
    run("straggler", tmp_path, line, monkeypatch)
    figures = results(tmp_path)
    for name in ("even", "straggler"):
        assert figures[name].keys() == set(script.METHODS)
        assert all(len(v) == 2 for row in figures[name].values() for v in row.values())
        assert "virtual seconds" in (tmp_path / name / "index.html").read_text()
        assert len(Comparison.read(tmp_path / name).cells) == 2 * len(script.METHODS)
    slower = {label: figures["even"][label]["rate"][0] / row["rate"][0] for label, row in figures["straggler"].items()}
    assert slower["all-reduce"] > 2 > 1.5 > slower["asgd"]
    assert is_picture(tmp_path / "straggler.png")


def test_stragglers_helpers() -> None:
    script = importlib.import_module("straggler")

    def cell(*accuracies: float) -> SimpleNamespace:
        notes = [ob.trace.Evaluation(10.0 * (i + 1), i, {"accuracy": a}) for i, a in enumerate(accuracies)]
        return SimpleNamespace(trace=SimpleNamespace(evaluations=notes))

    assert script.until(cell(0.5, 0.9, 0.8), 0.7) == pytest.approx(15.0)
    assert script.until(cell(0.5, 0.9), 0.3) == pytest.approx(5.0)
    assert script.until(cell(0.5, 0.6), 0.7) == math.inf
    assert script.until(cell(), 0.7) == math.inf
    assert script.show([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert script.show([1.0, math.inf], 1) == "not reached"
    assert script.ratio([2.0, 4.0], [1.0, 1.0]) == "3.00"
    assert script.ratio([1.0], [0.0]) == script.ratio([math.inf], [1.0]) == "-"


# jin


def test_jin_writes_all_rows_and_says_what_was_not_reached(monkeypatch, tmp_path, capsys) -> None:
    script = importlib.import_module("jin")
    monkeypatch.setattr(script, "RATES", (0.1, 0.8))
    run("jin", tmp_path, "--workers 2 4 --loss 2.0 --gradients 64 --seeds 0 1", monkeypatch)
    found = results(tmp_path)
    assert {(row["method"], row["workers"]) for row in found["rows"]} == {
        (name, n) for name in script.METHODS for n in (2, 4)
    }
    assert all(len(row["seconds"]) == 2 and row["lr"] in script.RATES for row in found["rows"])
    assert len(found["tuning"]) == len(script.METHODS) * 2 * 2
    assert {run["seed"] for run in found["tuning"]}.isdisjoint(found["seeds"])
    assert is_picture(tmp_path / "jin.png")
    assert all(sentence in capsys.readouterr().out for sentence in found["words"][:1])

    run("jin", tmp_path, "--workers 2 --loss 0.001 --gradients 8 --seeds 0", monkeypatch)
    assert all(row["seconds"] == [None] for row in results(tmp_path)["rows"])
    assert "0 of 1" in capsys.readouterr().out
    assert is_picture(tmp_path / "jin.png")


def test_jins_crossing_of_a_loss_and_of_lines() -> None:
    script = importlib.import_module("jin")
    assert script.crossing((10.0, 1.0), (20.0, 0.01), 0.1) == pytest.approx(15.0)
    assert script.crossing((0.0, math.inf), (20.0, 0.01), 0.1) == 20.0

    def rows(name: str, *seconds: float) -> list[object]:
        return [script.Row(name, 4 * 4**i, 0.1, [s]) for i, s in enumerate(seconds)]

    first, second, third, fourth = script.words(
        rows("a", 8.0, 8.0, 8.0) + rows("b", 4.0, 16.0, 32.0) + rows("c", 9.0, 9.0, math.inf)
    )
    assert first == "fastest: b at 4; a at 16, 64"
    assert second == "a and b: a overtakes between 4 and 16, at about 8"
    assert third == "a and c: a is ahead everywhere"
    assert fourth == "b and c: c overtakes between 4 and 16, at about 9; b overtakes between 16 and 64"
    nobody = script.words(rows("a", math.inf) + rows("b", math.inf))
    assert nobody[0] == "fastest: nobody at 4"


def test_a_run_of_jin_ends_at_the_goal_or_at_the_limit() -> None:
    script = importlib.import_module("jin")
    goal = script.Goal(loss=1.0, gradients=400)
    seconds, loss = script.reach("all-reduce", 2, 0.4, 0, goal)
    assert 0 < seconds < math.inf
    assert loss <= 1.0
    assert script.reach("all-reduce", 2, 0.4, 0, goal, limit=seconds / 2)[0] == math.inf
    assert script.reach("all-reduce", 2, 1e30, 0, goal)[0] == math.inf


# the papers' experiments on MNIST


def test_gem_mnist_has_all_rows_and_the_papers_figures(mnist, monkeypatch, tmp_path, capsys) -> None:
    script = run("gem_mnist", tmp_path, "--steps 2 --workers 5", monkeypatch)
    cells = results(tmp_path)["cells"]
    assert [(c["method"], c["workers"]) for c in sorted(cells, key=lambda c: c["method"])] == [
        ("Downpour", 5),
        ("GEM", 5),
    ]
    assert all(c["failure"] == "" and math.isfinite(c["final"]) for c in cells)
    assert is_picture(tmp_path / "gem_mnist.png")
    said = capsys.readouterr().out
    assert all(f"{script.PAPER[name][5][0]:.4f}" in said for name in script.METHODS)


def test_slowmo_mnist_has_all_rows(mnist, monkeypatch, tmp_path, capsys) -> None:
    script = run("slowmo_mnist", tmp_path, "--gradients 32 --workers 2 --seeds 0", monkeypatch)
    comparison = Comparison.read(tmp_path / "2-workers")
    assert [row.label for row in comparison.rows()] == [label for base in script.PAPER for label in script.labels(base)]
    assert not any(row.failed for row in comparison.rows())
    assert (tmp_path / "2-workers" / "index.html").is_file()
    said = capsys.readouterr().out
    assert all(base in said for base in script.PAPER)
