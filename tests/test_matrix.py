"""What `make test` leaves out: repetitions, and long runs of what another test shows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from conftest import COLLECTED

TESTS = Path(__file__).parent


def unseen(cases: dict[str, list[pytest.Mark | None]], there: set[str]) -> list[str]:
    """What is wrong with tests, given the marker of each of their cases, and the names of those that `make test` has."""
    wrong = []
    for name, marks in cases.items():
        if all(marks):
            shown = {mark.kwargs.get("shown") for mark in marks if mark}
            if shown == {None}:
                wrong.append(
                    f"{name}: make test runs no case of it; keep one, or name in shown= the test that shows it"
                )
            elif not shown <= there:
                wrong.append(f"{name}: it is said to be shown by {shown - there}, which make test does not run")
    for file in {name.partition("::")[0] for name in cases}:
        if all(mark for name, marks in cases.items() for mark in marks if name.partition("::")[0] == file):
            wrong.append(f"{file}: make test runs nothing of it")
    return sorted(wrong)


def test_every_fact_keeps_a_case(request: pytest.FixtureRequest) -> None:
    """Of the test files that this run has collected: of all, where it is of the whole suite."""
    if any("::" in word for word in request.config.args):
        pytest.skip("single tests were asked for, which may be of the matrix all")
    cases: dict[str, list[pytest.Mark | None]] = defaultdict(list)
    for item in request.config.stash[COLLECTED]:
        name = item.nodeid.partition("[")[0]
        cases[f"{Path(name.partition('::')[0]).name}::{name.partition('::')[2]}"].append(
            item.get_closest_marker("matrix")
        )
    there = {name for name, marks in cases.items() if not all(marks)}
    for name in {mark.kwargs["shown"] for marks in cases.values() for mark in marks if mark and "shown" in mark.kwargs}:
        file, _, test = name.partition("::")  # one that was not collected
        if (TESTS / file).is_file() and not any(n.startswith(f"{file}::") for n in cases):
            there |= {name} if f"def {test}(" in (TESTS / file).read_text() else set()
    assert unseen(cases, there) == []


def test_what_the_rule_refuses() -> None:
    plain, shown = pytest.mark.matrix.mark, pytest.mark.matrix(shown="a.py::x").mark
    assert unseen({"a.py::x": [None, plain], "b.py::y": [None], "b.py::z": [shown]}, {"a.py::x"}) == []
    assert unseen({"a.py::x": [plain, plain], "a.py::y": [None]}, {"a.py::y"}) == [
        "a.py::x: make test runs no case of it; keep one, or name in shown= the test that shows it"
    ]
    assert unseen({"b.py::y": [None], "b.py::z": [shown]}, {"b.py::y"}) == [
        "b.py::z: it is said to be shown by {'a.py::x'}, which make test does not run"
    ]
    assert unseen({"b.py::z": [shown]}, {"a.py::x"}) == ["b.py: make test runs nothing of it"]
