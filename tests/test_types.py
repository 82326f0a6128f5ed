"""Types: what a type checker knows of the package in a user's script.

Methods are found by their folder at import, which no type checker does. So ``methods/__init__.pyi`` lists them:
``python tests/test_types.py`` writes it, and a test holds it against the folder.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import offbeat as ob

ROOT = Path(ob.__file__).parent
STUB = ROOT / "methods" / "__init__.pyi"


def stub() -> str:
    """The text of the stub for the methods that are there now."""
    classes = (value for name in ob.methods.__all__ if isinstance(value := getattr(ob.methods, name), type))
    homes = sorted((cls.__module__.rpartition(".")[2], cls.__name__) for cls in classes)
    imports = [f"from .{module} import {name} as {name}" for module, name in homes]
    lines = [
        '"""The methods as a type checker sees them: written by tests/test_types.py."""',
        "# ruff: noqa: I001, RUF022",
        "",
        "from ..core.method import Method",
        *imports,
        "",
        "__all__ = [",
        *(f'    "{name}",' for name in ob.methods.__all__),
        "]",
        "",
        "def all_methods() -> list[type[Method]]: ...",
        "def find(name: str) -> type[Method]: ...",
        "",
    ]
    return "\n".join(lines)


def test_the_stub_lists_the_folder() -> None:
    assert STUB.read_text("utf-8") == stub(), "write it anew: python tests/test_types.py"


def test_the_package_says_that_it_has_types() -> None:
    """The marker and the stub are there, and are installed with the package."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text("utf-8"))
    installed = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["offbeat"] for path in ROOT.glob(pattern)
    }
    assert {ROOT / "py.typed", STUB} <= installed
    assert all(path.is_file() for path in installed)


SCRIPT = """
import torch
from torch import nn
import offbeat as ob
from offbeat.methods import GEM

model = nn.Linear(2, 1)
replica = ob.Replica(model, ob.methods.DanaZero(lr=0.05))
run = ob.simulate(ob.SlowMo(ob.Local(ob.Adam())), ob.tasks.Digits(), ob.Cluster(4), gradients=100)
reveal_type(ob.methods.DanaZero(lr=0.05))
reveal_type(ob.DanaZero(lr=0.05).momentum)
reveal_type(GEM)
reveal_type(ob.methods.find("gem"))
reveal_type(replica)
reveal_type(replica.step)
reveal_type(run)
reveal_type(run.summary())
ob.methods.DanaZero(learning_rate=0.05)
ob.DanaZeroo()
ob.simulate(ob.tasks.Digits(), ob.methods.GEM(), gradients=1)
"""

REVEALED = [
    "offbeat.methods.dana.DanaZero",
    "float",
    "def (",
    "type[offbeat.core.method.Method]",
    "offbeat.runtime.replica.Replica",
    "def (",
    "offbeat.engines.simulator.Run",
    "dict[str, float]",
]

WRONG = [
    'Unexpected keyword argument "learning_rate" for "DanaZero"',
    'Module has no attribute "DanaZeroo"',
    'Argument 1 to "simulate" has incompatible type "Digits"; expected "Method"',
    'Argument 2 to "simulate" has incompatible type "GEM"; expected "Problem"',
]


def test_a_type_checker_knows_the_methods(tmp_path: Path) -> None:
    """In a user's script, and finds what is wrong in it. Without torch's own types, which take a minute to read."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = True\nmypy_path = {ROOT.parent}\nfollow_imports = silent\n"
        "[mypy-torch.*,numpy.*,sklearn.*,matplotlib.*,PIL.*,sacrebleu.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    ).stdout
    lines = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("script.py")]
    revealed = [line.partition('Revealed type is "')[2] for line in lines if "Revealed type" in line]
    revealed = [found.replace("builtins.", "") for found in revealed]  # which older ones say
    assert len(revealed) == len(REVEALED), said
    assert all(found.startswith(wanted) for found, wanted in zip(revealed, REVEALED, strict=True)), said
    assert not any(found.startswith("Any") for found in revealed)
    errors = [line for line in lines if line.startswith("error: ")]
    assert [any(wrong in error for error in errors) for wrong in WRONG] == [True] * len(WRONG), said
    assert len(errors) == len(WRONG), said


if __name__ == "__main__":
    STUB.write_text(stub(), "utf-8")
