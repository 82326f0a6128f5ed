"""Grids: what a cell is, that the number of processes does not matter, what is kept, and how things go wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import offbeat as ob
from offbeat import experiment
from offbeat.experiment import Cell, CellFailed, Comparison, Grid, Key, compare, rerun, warmed
from offbeat.names import names, read
from offbeat.tasks import Digits, Mnist, Quadratic

SMALL = Grid(
    ("asgd", "dana-zero", "gem(kappa=2.0)", "local-sgd", "asgd(lr=5000.0)"),
    Quadratic(d=5),
    workers=(1, 3),
    seeds=(0, 1),
    gradients=200,
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(SMALL, jobs=1)


def test_every_cell_is_what_simulate_gives(comparison: Comparison) -> None:
    cell = next(c for c in comparison.cells if c.key == Key("dana-zero", 3, 1))
    method = ob.methods.DanaZero(lr=0.05 * ob.Warmup(10), momentum=0.9)
    run = ob.simulate(method, Quadratic(d=5, seed=1), ob.Cluster(3), gradients=200, seed=1, evaluate_every=10)
    assert list(cell.trace) == list(run.trace)
    assert cell.figures == run.summary()


def test_the_number_of_processes_does_not_matter(comparison: Comparison) -> None:
    seen: list[Cell] = []
    assert compare(SMALL, jobs=2, watch=seen.append) == comparison
    assert sorted(cell.key for cell in seen) == sorted(SMALL.keys)


def test_a_comparison_survives_its_folder(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write(tmp_path)
    assert (tmp_path / "traces" / "gem_kappa=2.0-3w-seed1.jsonl").is_file()
    again = Comparison.read(tmp_path)
    assert again == comparison
    assert again.table() == comparison.table()


def test_a_damaged_comparison_is_named(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write(tmp_path)
    text = (tmp_path / "comparison.json").read_text()
    (tmp_path / "comparison.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"comparison\.json is not what `offbeat compare` has written"):
        Comparison.read(tmp_path)


def test_a_run_that_fails_is_reported_by_name_and_keeps_its_trace(comparison: Comparison) -> None:
    failed = [cell for cell in comparison.cells if cell.failure]
    assert {cell.key.label for cell in failed} == {"asgd(lr=5000.0)"}
    assert all(cell.failure == "Diverged" and 0 < len(cell.trace) < 200 and not cell.figures for cell in failed)
    row = comparison.rows()[-1]
    assert (row.label, row.mean, len(row.failed)) == ("asgd(lr=5000.0)", {}, 2)
    assert comparison.table()[-1][-1] == "Diverged 2 of 2"


def test_rows_are_means_over_seeds(comparison: Comparison) -> None:
    row = next(row for row in comparison.rows() if (row.label, row.workers) == ("asgd", 3))
    losses = torch.tensor([cell.figures["loss"] for cell in row.cells])
    assert row.mean["loss"] == pytest.approx(float(losses.mean()))
    assert row.spread["loss"] == pytest.approx(float(losses.std()))  # of a sample
    assert row.mean["speedup"] == pytest.approx(3, rel=0.05)
    one = next(row for row in comparison.rows() if (row.label, row.workers) == ("asgd", 1))
    assert one.mean["speedup"] == 1


def test_without_a_single_worker_the_speed_up_is_over_one_that_waits_for_nobody(comparison: Comparison) -> None:
    cells = [cell for cell in comparison.cells if cell.key.workers == 3]
    header = {**comparison.header, "workers": [3]}
    assert Comparison(header, cells).rows()[0].mean["speedup"] == pytest.approx(comparison.rows()[1].mean["speedup"])


def test_one_seed_has_no_spread() -> None:
    row = compare(Grid(("asgd",), Quadratic(), workers=(2,), seeds=(5,), gradients=10), jobs=1).rows()[0]
    assert row.spread == {}
    assert row.cells[0].key.seed == 5


# the line-up


def test_shared_settings_reach_every_method_that_has_them_and_yield_to_the_entry() -> None:
    entries = ("asgd", "asgd(momentum=0.6)", ob.methods.GapAware(momentum=0.8), "local-sgd", "async-adam(lr=0.001)")
    lineup = Grid(entries, lr=0.2, momentum=0.7, weight_decay=0.01).lineup
    assert lineup == {
        "asgd": ob.methods.ASGD(lr=0.2, momentum=0.0, weight_decay=0.01),
        "asgd(momentum=0.6)": ob.methods.ASGD(lr=0.2, momentum=0.6, weight_decay=0.01),
        "gap-aware(momentum=0.8)": ob.methods.GapAware(lr=0.2, momentum=0.8, weight_decay=0.01),
        "local-sgd": ob.methods.LocalSGD(ob.Local(ob.SGD(0.2, momentum=0.7, nesterov=True, weight_decay=0.01))),
        "async-adam(lr=0.001)": ob.methods.AsyncAdam(lr=0.001, weight_decay=0.01),
    }


def test_without_shared_settings_every_method_keeps_its_own() -> None:
    grid = Grid(("gem", "lwp(0.3)"), lr=None, momentum=None)
    assert grid.lineup == {"gem": ob.methods.GEM(), "lwp(0.3)": ob.methods.LWP(lr=0.3)}


def test_the_warm_up_is_a_part_of_the_run_in_the_steps_that_the_method_counts() -> None:
    assert warmed(ob.methods.ASGD(lr=0.1), 0.05, 4000, 8) == ob.methods.ASGD(lr=0.1 * ob.Warmup(200))
    dpsgd = ob.methods.DPSGD(ob.SGD(0.1))
    assert warmed(dpsgd, 0.05, 4000, 8) == ob.methods.DPSGD(ob.SGD(0.1 * ob.Warmup(25)))
    assert warmed(dpsgd, 0.0, 4000, 8) is dpsgd


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "Grid.methods = (): give at least one"),
        ({"methods": ("asgd", "asgd")}, "there twice"),
        ({"methods": ("asgd", ob.methods.ASGD())}, "Grid.methods = 'asgd': it is there twice"),
        ({"methods": ("dana-zer",)}, "did you mean dana-zero"),
        ({"methods": ("gem(kapa=2)",)}, "unexpected keyword argument 'kapa'"),
        ({"methods": ("gem(kappa=-2)",)}, "GEM.kappa = -2"),
        ({"methods": ("gem(kappa=2",)}, "cannot read the value"),
        ({"workers": (1, 0)}, "Cluster.workers = 0"),
        ({"workers": (2, 2)}, "there twice"),
        ({"seeds": (0.5,)}, "Grid.seeds = (0.5,): must be integers"),
        ({"gradients": 0}, "Grid.gradients = 0"),
        ({"warmup": 1.5}, "Grid.warmup = 1.5"),
        ({"lr": -1.0}, "ASGD.lr = -1.0"),
        ({"momentum": 1.0}, "NAGASGD.momentum = 1.0"),
        ({"speed": 1.0}, "Cluster.speed = 1.0"),
        ({"task": 3}, "Grid.task = 3: must be a dataclass with a field `seed`"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid(**settings)  # type: ignore[arg-type]


def test_a_bad_number_of_processes_is_named() -> None:
    with pytest.raises(ValueError, match="jobs = 0"):
        compare(SMALL, jobs=0)


# trouble


@dataclass(frozen=True)
class Deadly(Quadratic):
    """Ends the process, or raises, at one worker's third gradient."""

    raises: bool = False

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        if (self.seed, worker, step) == (1, 0, 2):
            if self.raises:
                raise ZeroDivisionError("a bug in the task")
            os._exit(9)
        return super().grad(x, worker, step)


def test_a_process_that_dies_is_an_error_that_names_the_cell() -> None:
    grid = Grid(("asgd",), Deadly(), workers=(2,), seeds=(1,), gradients=50)
    with pytest.raises(CellFailed, match="asgd, 2 workers, seed 1 was lost: its process died with exit code 9"):
        compare(grid, jobs=2)


def test_what_cannot_go_to_another_process_is_refused_with_the_way_out() -> None:
    data = torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)
    task = ob.Supervised(lambda: nn.Linear(2, 2), nn.functional.cross_entropy, data, data, batch=4)
    grid = Grid(("asgd",), task, workers=(2,), seeds=(0, 1), gradients=8, evaluations=1)
    with pytest.raises(ValueError, match=r"lambda.*cannot.*jobs=1"):
        compare(grid, jobs=2)
    assert len(compare(grid, jobs=1).cells) == 2


def test_by_default_there_are_as_many_processes_as_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def there(grid: Grid, lanes: dict[int, int], jobs: int) -> Iterator[list[Cell]]:
        asked.append(jobs)
        return experiment._here(grid, lanes)

    monkeypatch.setattr(experiment, "cpus", lambda: 3)
    monkeypatch.setattr(experiment, "_there", there)
    compare(Grid(("asgd",), Quadratic(), workers=(1,), seeds=(0,), gradients=8))
    assert asked == [3]


def test_an_error_in_the_code_names_the_cell_and_has_a_traceback() -> None:
    grid = Grid(("asgd",), Deadly(raises=True), workers=(2,), seeds=(1,), gradients=50)
    with pytest.raises(CellFailed, match="asgd, 2 workers, seed 1 failed") as error:
        compare(grid, jobs=2)
    assert "ZeroDivisionError: a bug in the task" in str(error.value)
    assert "line" in str(error.value)


def test_missing_data_is_told_before_any_process_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path))
    with pytest.raises(ob.tasks.DataMissing, match="MNIST"):
        compare(Grid(("asgd",), Mnist()), jobs=2)


# names, and running a trace again


def test_every_method_and_task_can_be_read_from_its_repr() -> None:
    assert {cls.__name__ for cls in ob.methods.all_methods()} <= names().keys()
    events = (ob.Crash(1, 3.0), ob.Join(1, 5.0))
    for value in (
        *(cls() for cls in ob.methods.all_methods()),
        ob.methods.GapAware(0.1 * ob.Warmup(5) * ob.MultiStep((10, 20)), correction=ob.methods.AppliedGapPenalty()),
        ob.Cluster(3, ob.LogNormal(cv=0.3), events),
        Digits(hidden=7),
        Quadratic(seed=-3),
    ):
        assert read(repr(value)) == value


def test_a_value_that_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot read the value 'Warmup\(step=3\)'.*'step'"):
        read("Warmup(step=3)")
    with pytest.raises(ValueError, match="cannot read the value"):
        read("(" * 5000 + ")" * 5000)


def test_a_trace_runs_again_bit_for_bit(tmp_path: Path) -> None:
    method = ob.methods.GEM(0.05 * ob.Warmup(20), kappa=2.0)
    cluster = ob.Cluster(3, ob.Gamma(cv=0.1, machine_cv=0.6), (ob.Crash(1, 3.0), ob.Join(1, 5.0)))
    run = ob.simulate(method, Digits(hidden=8, seed=4), cluster, gradients=60, seed=2, evaluate_every=20)
    run.trace.write(tmp_path / "trace.jsonl")
    again = rerun(ob.Trace.read(tmp_path / "trace.jsonl"))
    assert again.trace == run.trace
    assert torch.equal(again.x, run.x)


def test_a_problem_that_is_not_the_library_s_cannot_run_again() -> None:
    run = ob.simulate(ob.methods.ASGD(), Deadly(), ob.Cluster(2), gradients=10)
    with pytest.raises(ValueError, match=r"its problem .Deadly\(.*is no value of the library"):
        rerun(run.trace)


def test_a_trace_of_another_engine_cannot_run_again() -> None:
    with pytest.raises(ValueError, match="its engine is None"):
        rerun(ob.Trace({}))
