"""What a release is made of says the same thing everywhere: versions, pins, targets and metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import offbeat as ob

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")
)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_what_an_extra_names_is_pinned(extra: str) -> None:
    names = {
        plain(re.match(r"[\w.-]+", wanted)[0])  # type: ignore[index]
        for wanted in PROJECT["optional-dependencies"][extra]
    }
    assert names - {"offbeat"} <= {plain(name) for name in PINS}


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {ob.__version__}\n" in text("CITATION.cff")
    assert text("CHANGELOG.md").split("## ")[1].startswith(ob.__version__)


def test_hooks_before_a_commit_take_the_pinned_versions() -> None:
    found = re.findall(r"([\w-]+)==([\d.]+)", text(".pre-commit-config.yaml"))
    assert {name for name, _ in found} == {"ruff", "pre-commit-hooks"}
    assert {version for name, version in found if name == "ruff"} == {PINS["ruff"]}


def test_the_full_matrix_is_run_once_a_day_and_by_hand() -> None:
    """A push runs what `make test` does; the marker is spelt alike in the Makefile, for pytest and for the integration."""
    workflow, makefile = text(".github/workflows/ci.yml"), text("Makefile")
    assert re.search(r'^  schedule:\n    - cron: "\d+ \d+ \* \* \*"', workflow, re.M)
    assert re.search(r"^  workflow_dispatch:", workflow, re.M)
    assert "&& 'matrix or not matrix' || 'not matrix'" in workflow
    assert re.search(r'^test: install\n\t.*-m "not matrix"$', makefile, re.M)
    assert re.search(r"^test-all: install\n\t.*pytest \$\(PARALLEL\)$", makefile, re.M)


def test_integration_calls_what_is_there() -> None:
    """Make targets, the test files for other systems, and the lowest versions that the project promises."""
    workflow = text(".github/workflows/ci.yml")
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    called = set(re.findall(r"run: make (\w+)", workflow))
    assert called == {"lint", "docs", "dist"}
    assert called <= targets
    files = re.findall(r"tests/\w+\.py", workflow)
    assert len(files) >= 5
    assert all((ROOT / name).is_file() for name in files)
    lowest = PROJECT["dependencies"][0].removeprefix("torch>=")
    assert f'python: "{PROJECT["requires-python"].removeprefix(">=")}", torch: "=={lowest}.*"' in workflow
    for version in re.findall(r'python: "(3\.\d+)"', workflow):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
