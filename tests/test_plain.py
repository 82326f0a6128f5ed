"""What the library writes for others to read is JSON: no ``NaN``, which other programs refuse."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

import offbeat
from offbeat.cli.display import board, headline
from offbeat.cli.run import _lines
from offbeat.plain import dumps, numbers
from offbeat.runtime.launch import Launch

STATUS = {
    "made": 1.0,
    "lives": {},
    "steps": {},
    "finished": [],
    "ending": "",
    "seconds": 1.5,
    "gradients": 3,
    "minibatches": 3,
    "total": None,
    "launched": 2,
    "refused": 0,
    "workers": [
        {
            "worker": 0,
            "gradients": 3,
            "rate": math.nan,
            "lag": 1,
            "gap": math.nan,
            "loss": math.inf,
            "seen": 0.1,
            "life": 1,
        }
    ],
}


def strict(text: str) -> Any:
    def refused(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refused)


@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_no_finite_number_is_null(indent: int | None) -> None:
    value = {"a": [1.0, math.nan, (math.inf, {"b": -math.inf, "c": "nan", "d": None, "e": True})], "f": 2}
    assert strict(dumps(value, indent)) == {
        "a": [1.0, None, [None, {"b": None, "c": "nan", "d": None, "e": True}]],
        "f": 2,
    }
    assert dumps({"a": [0.1, 1e300]}, indent) == json.dumps({"a": [0.1, 1e300]}, indent=indent)
    assert str(numbers({"a": None, "b": 2.0})) == "{'a': nan, 'b': 2.0}"


def test_a_servers_status_is_json_that_the_launcher_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shows: what is not known yet is no error."""
    _lines(STATUS)
    text = capsys.readouterr().out
    assert strict(text)["workers"][0]["gap"] is None
    seen: list[dict[str, Any]] = []
    launch = Launch(tmp_path, ["server"], ["worker"], 1, watch=seen.append)
    launch._servers = ["server 0"]
    assert len(list(launch._hear("server 0", [text.encode(), b"no json\n", b"7\n"]))) == 1
    (status,) = seen
    assert [math.isnan(status["workers"][0][name]) for name in ("rate", "gap", "loss", "lag")] == [
        True,
        True,
        True,
        False,
    ]
    monkeypatch.setenv("CI", "1")
    with board() as tell:
        tell(status)
    assert "3 gradients, 0/s, 1 of 2 workers" in capsys.readouterr().err


def test_the_headline_of_a_run() -> None:
    """What is done of the total, how fast, how long it will take, who is there, and what is waited for at the end."""
    workers = [{"rate": 10.0}, {"rate": math.nan}]
    status = STATUS | {"minibatches": 200, "gradients": 200, "total": 1400, "workers": workers, "launched": 4}
    assert headline(status) == "200 of 1,400 minibatches, 10/s, 0:02:00 left, 2 of 4 workers"
    assert headline(status | {"minibatches": 400}) == "400 of 1,400 minibatches, 10/s, 0:00:50 left, 2 of 4 workers"
    assert headline(status | {"minibatches": 1400}) == "1,400 of 1,400 minibatches, 10/s, 2 of 4 workers"
    assert headline(status | {"total": None, "ending": "the model is evaluated"}) == (
        "200 gradients, 10/s, 2 of 4 workers, the model is evaluated"
    )


def test_nothing_else_writes_json() -> None:
    """But for the notes of our own links, which only Python reads."""
    root, writers = Path(offbeat.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                writers.add(str(path.relative_to(root)))
    assert writers == {"plain.py", "runtime/link.py"}
