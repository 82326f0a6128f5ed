"""Who may import whom: methods -> core <- engines, tasks -> core, and only the outermost modules know everybody."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import offbeat

ROOT = Path(offbeat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PARTS = {path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0] for path in FILES}

EVERYBODY, ANYTHING = PARTS | {"__version__"}, None

ARROWS: dict[str, tuple[set[str], set[str] | None]] = {
    # part of the package: (parts it may import, third-party packages it may import)
    "core": ({"core"}, {"torch"}),
    "methods": ({"core", "methods"}, {"torch"}),
    "tasks": ({"core", "tasks"}, ANYTHING),
    "plain": (set(), set()),
    "formats": ({"__version__"}, set()),
    "trace": ({"plain", "formats"}, {"torch"}),
    "failure": ({"trace"}, {"torch"}),
    "cpus": (set(), set()),
    "log": (set(), set()),
    "watch": ({"log", "plain", "tracking", "watch"}, set()),
    "integrations": ({"core", "runtime"}, {"lightning", "torch", "transformers"}),
    "tracking": ({"log", "tracking", "watch"}, {"mlflow", "torch", "wandb"}),
    "engines": ({"core", "engines", "trace", "failure", "__version__"}, {"torch"}),
    "runtime": (
        {
            "core",
            "cpus",
            "engines",
            "log",
            "names",
            "plain",
            "formats",
            "runtime",
            "tasks",
            "trace",
            "failure",
            "__version__",
        },
        {"torch"},
    ),
    "experiment": (EVERYBODY, ANYTHING),
    "figures": (EVERYBODY, {"torch"}),
    "report": (EVERYBODY, ANYTHING),
    "predict": ({"core", "engines", "failure", "names", "predict", "report", "tasks", "trace"}, {"torch"}),
    "names": (EVERYBODY, ANYTHING),
    "cli": (EVERYBODY, ANYTHING),
    "__main__": (EVERYBODY, ANYTHING),
    "__init__": ({"api", "methods"}, set()),
    "api": (EVERYBODY, {"torch"}),
}


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every module that a module of ``package`` imports, anywhere in it, as its dotted parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    inside = path.relative_to(ROOT)
    part = inside.parts[0].removesuffix(".py")
    assert part in ARROWS, f"say in ARROWS what {part} may import"
    parts, outsiders = ARROWS[part]
    for module in imports(ast.parse(path.read_text("utf-8")), (ROOT.name, *inside.parent.parts)):
        top = module[0]
        if top == ROOT.name:
            target = module[1] if len(module) > 1 else "__init__"
            assert target in parts, f"{inside} must not import {'.'.join(module)}"
        elif top not in sys.stdlib_module_names:
            assert outsiders is None or top in outsiders, f"{inside} must not import {top}"


IMPURE = {"socket", "selectors", "select", "threading", "queue", "time", "os", "subprocess", "asyncio", "logging"}


@pytest.mark.parametrize("path", sorted((ROOT / "runtime/protocol").glob("*.py")), ids=lambda p: p.name)
def test_the_protocol_has_no_socket_thread_or_clock(path: Path) -> None:
    """Events in, effects out: what a machine does depends on nothing else, and can be tried again."""
    package = (ROOT.name, *path.parent.relative_to(ROOT).parts)
    for module in imports(ast.parse(path.read_text("utf-8")), package):
        assert module[0] not in IMPURE, f"{path.name} must not import {module[0]}"
        inside = module[:2] != (ROOT.name, "runtime") or module[:3] == (ROOT.name, "runtime", "protocol")
        assert inside or module[2:3] == ("leases",), f"{path.name} must not import {'.'.join(module)}"


def test_the_check_sees_every_form_of_import() -> None:
    text = "import a.b\ndef f():\n    from ..tasks import x\n    from . import y\n    from .. import z\nfrom offbeat.cli import w"
    assert set(imports(ast.parse(text), ("offbeat", "core"))) == {
        ("a", "b"),
        ("offbeat", "tasks", "x"),
        ("offbeat", "core", "y"),
        ("offbeat", "z"),
        ("offbeat", "cli", "w"),
    }
