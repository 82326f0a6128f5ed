"""What the test files share: one small problem, and what "equal" means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Nursery, Processes, Serving, at_work, rest, shared_memory, time_out
from torch import Tensor

TOLERANCE = 1e-9  # relative, in float64: rounding stays far below it, a wrong term far above


COLLECTED: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()
"""All cases, those that `-m` takes away among them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)


def some(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """For a parametrization: all cases, of which `make test` runs those ``kept``, and `make test-all` the others too."""
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} of {cases}"
    return [
        case if case in kept else pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.matrix)
        for case in cases
    ]


def one_of(every: int, cases: Iterable[Any]) -> list[Any]:
    """For a parametrization: all cases, of which `make test` runs the first and one of ``every`` so many after it."""
    return [case if i % every == 0 else pytest.param(case, marks=pytest.mark.matrix) for i, case in enumerate(cases)]


def named(value: Any) -> str:
    """A value in the name of a case."""
    if isinstance(value, tuple):
        return "-".join(map(named, value))
    return str(getattr(value, "name", None) or getattr(value, "__name__", value))


def by_turns(cases: Iterable[Any], others: Iterable[Any], every: int | None = None) -> list[Any]:
    """For a parametrization by two values: all pairs, of which `make test` runs for each case one of the others by turns, or
    one of ``every`` so many.
    """
    cases, others = list(cases), list(others)
    every = every or len(others)
    return [
        pytest.param(
            case, other, marks=[] if (j - i) % every == 0 else [pytest.mark.matrix], id=f"{named(case)}-{named(other)}"
        )
        for i, case in enumerate(cases)
        for j, other in enumerate(others)
    ]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts servers in threads of this process; they, and all threads of theirs, are gone after the test."""
    before, running = at_work(), list[Serving]()

    def serve(*args: object, folder: str = "run", **options: object) -> Serving:
        running.append(Serving(*args, tmp_path / folder, **options))  # type: ignore[arg-type]
        return running[-1]

    with time_out():
        yield serve
    for one in running:
        one.stop()
    rest(before)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def processes(nursery: Nursery, tmp_path: Path) -> Iterator[Processes]:
    """Starts processes; whatever is left of them after the test is killed, and nothing is left in shared memory."""
    processes, names = Processes(nursery, tmp_path), shared_memory()
    with time_out():
        yield processes
    processes.end()
    assert shared_memory() == names


@dataclass(frozen=True)
class Bowl:
    """A convex, coupled, slightly non-quadratic bowl; the noise of a gradient is a pure function of (worker, step)."""

    d: int = 7
    noise: float = 0.3
    dtype: torch.dtype = torch.float64

    @cached_property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        k = torch.arange(1, self.d + 1, dtype=torch.float64)
        mix = torch.sin(torch.outer(k, k))
        hessian = torch.diag(torch.logspace(0, -1, self.d, dtype=torch.float64)) + 0.2 * mix @ mix.T / self.d
        return tuple(t.to(self.dtype) for t in (hessian, 2 + torch.cos(k), k))  # type: ignore[return-value]

    def x0(self) -> Tensor:
        return torch.linspace(-1, 1, self.d, dtype=self.dtype) + 0.15

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        hessian, optimum, k = self.numbers
        off = x - optimum
        pull, root = hessian @ off, (1 + off * off).sqrt()
        noise = self.noise * torch.sin(k * (0.7 + 1.3 * step + 2.9 * worker))
        return pull + 0.1 * off / root + noise, 0.5 * off @ pull + 0.1 * (root.sum() - self.d)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {"loss": float(self.grad(x, 0, 0)[1])}


def error(a: Tensor, b: Tensor) -> float:
    """The largest relative error, row by row, of two histories [steps, d] (or of two vectors)."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float64
    worst = ((a - b).norm(dim=-1) / b.norm(dim=-1)).max()
    return float(worst) if torch.isfinite(a).all() else float("inf")


def same(a: Tensor, b: Tensor) -> bool:
    return error(a, b) <= TOLERANCE


def differ(a: Tensor, b: Tensor) -> bool:
    """Not equal, and by far more than rounding."""
    return error(a, b) > 1e-4
