"""The benchmarks' own code: what they share, not what they measure."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import exchanges, gpu, steps, systems  # noqa: E402
from benchmarks.__main__ import benchmarks, main  # noqa: E402
from benchmarks.measure import Row, over  # noqa: E402
from benchmarks.page import BLOCK, refresh  # noqa: E402
from benchmarks.picture import draw  # noqa: E402
from benchmarks.record import Record  # noqa: E402
from benchmarks.systems import Driver, Failed, Restless, Running, System, in_turn  # noqa: E402
from offbeat.report import LIGHT, png  # noqa: E402

ROWS = (
    Row("ours", "steps/s", (900.0, 1000.0, 1100.0), "a server", "0.1"),
    Row("theirs", "steps/s", (250.0, 270.0, 240.0), "a server", "2.0", peer=True),
    Row("broken", "steps/s", (math.nan,), "a server", "ModuleNotFoundError: No module named 'broken'", peer=True),
    Row("ours / theirs", "x", (3.6, 3.7, 4.5), aim=5.0),
)
RECORD = replace(Record.new("speed", "How fast?", ROWS, 12.0), machine={"processor": "a | b", "cores": "2"})


def test_every_question_is_found_and_can_be_run() -> None:
    found = benchmarks()
    assert {"steps", "exchanges", "gpu", "simulation", "events"} <= set(found)
    assert not {"measure", "record", "picture", "page", "systems"} & set(found)
    assert all(callable(module.run) and module.__doc__ for module in found.values())


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match=r"'nonsense' is no benchmark: choose among .*steps"):
        main(["nonsense"])


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert "NaN" not in (tmp_path / "speed.json").read_text()
    again = Record.read(tmp_path / "speed.json")
    assert repr(again) == repr(RECORD)  # nan is not equal to itself


def test_a_picture_is_drawn_of_whatever_there_is() -> None:
    for rows in (ROWS, ROWS[:1], ROWS[2:3], (replace(ROWS[0], values=(0.001, 5000.0)),)):
        image = png(partial(draw, replace(RECORD, rows=rows)), LIGHT)
        assert image.startswith(b"\x89PNG")
        assert 4_000 < len(image) < 120_000


def test_the_page_gets_its_tables_from_the_records_and_keeps_the_rest() -> None:
    page = "# Title\n\nwords\n\n<!-- speed -->\nold\n<!-- / -->\n\nmore words\n\n<!-- other -->\nkept\n<!-- / -->\n"
    text = refresh(page, {"speed": RECORD})
    assert "old" not in text
    assert "| a server | ours | steps/s | 900 | 1,000 | 1,100 |" in text
    assert "a / b" in text or "a | b, cores: 2" in text
    assert "| broken | steps/s | - | - | - |" in text
    assert "ModuleNotFoundError" in text
    assert text.startswith("# Title\n\nwords\n\n<!-- speed -->\n")
    assert text.endswith("more words\n\n<!-- other -->\nkept\n<!-- / -->\n")
    assert refresh(text, {"speed": RECORD}) == text
    assert "images/bench-speed.png" in text
    assert "images" not in refresh(page, {"speed": replace(RECORD, rows=ROWS[2:3])})  # nothing to draw
    with pytest.raises(ValueError, match="no place for speed"):
        refresh("nothing", {"speed": RECORD})


def test_the_page_of_the_documentation_has_a_place_for_every_question() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    places = BLOCK.findall(text)
    assert len(set(places)) == len(places)
    assert set(benchmarks()) <= set(places)


def test_a_ratio_of_what_did_not_run_is_no_number() -> None:
    assert over(ROWS[0], ROWS[1], "x").values[0] == 900 / 250
    assert math.isnan(over(ROWS[0], ROWS[2], "x").median)


def test_an_aim_is_missed_on_its_own_side() -> None:
    row = Row("a", "x", (0.5, 0.6, 0.7))
    assert not row.missed
    assert replace(row, aim=0.65).missed
    assert not replace(row, aim=0.65, less=True).missed
    assert replace(row, aim=0.55, less=True).missed


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts that report at once, fail, or hang."""
    (tmp_path / "work.py").write_text((ROOT / "benchmarks" / "peers" / "work.py").read_text())
    (tmp_path / "good.py").write_text(
        "import os, time\nfrom work import timed\ntimed(lambda: time.sleep(0.001), int(os.environ['RANK']), '1.0', 1, 5)"
    )
    (tmp_path / "bad.py").write_text("raise KeyError('no such thing')")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)")
    monkeypatch.setattr(systems, "SCRIPTS", tmp_path)
    return tmp_path


def test_systems_take_turns_and_failures_are_reported(peers: Path) -> None:
    listed = [Driver("good", "good.py"), Restless("anew", "good.py"), System("bad", "bad.py")]
    good, anew, bad = in_turn(listed, 2, "steps/s", "group")
    for row in (good, anew):
        assert len(row.values) == 2
        assert all(0 < value < 1000 for value in row.values)
        assert row.note == "1.0"
    assert math.isnan(bad.median)
    assert bad.note == "did not run: KeyError: 'no such thing'"


def test_a_system_that_hangs_is_given_up_and_ended(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "TIMEOUT", 0.5)
    running = Running(System("slow", "slow.py"), 1)
    with pytest.raises(Failed, match=r"not done within 0.5 s"), running:
        raise AssertionError("it said that it was ready")
    assert len(running.working) == 2
    assert all(process.poll() is not None for process in running.working)


def test_a_program_that_is_not_there_is_named(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(peers))
    (row,) = in_turn([systems.Mpi("mpi", "good.py")], 1, "ms", "group")
    assert row.note == "did not run: there is no program mpirun"


def test_all_pairs_are_of_systems_that_run() -> None:
    listed = [system for group in steps.GROUPS.values() for system in group]
    names = {system.name for system in listed}
    assert len(names) == len(listed)
    for ours, theirs in steps.PAIRS:
        assert {ours, theirs} <= names
    assert {system.name for system in listed if not system.ours} == {theirs for _, theirs in steps.PAIRS}
    scripts = {system.script for groups in (steps.GROUPS, exchanges.GROUPS) for g in groups.values() for system in g}
    assert {*scripts, "work.py"} == {path.name for path in (ROOT / "benchmarks" / "peers").glob("*.py")}
    assert any(isinstance(system, Restless) for system in listed)


def test_without_a_gpu_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    (row,) = gpu.run()
    assert math.isnan(row.median)
    assert row.note == "no GPU was found"


def test_the_gpu_benchmark_measures_on_any_device() -> None:
    rows = gpu.training(gpu.problem("cpu", images=64, batch=4), workers=3, gradients=6, repeats=1)
    assert all(row.median > 0 for row in rows)
    kernels = gpu.kernels("cpu", size=3000, repeats=1)
    assert len(kernels) > 10
    assert all(row.median > 0 or row.note for row in kernels)
