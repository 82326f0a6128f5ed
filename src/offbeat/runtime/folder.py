"""The folder of a run: it holds one run, and one process at a time writes to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on a system without it nothing is locked
    fcntl = None  # type: ignore[assignment]

RESULTS = ("trace.jsonl", "model.pt", "summary.json", "comparison.json", "snapshots/*.snapshot", "shard-*/*")
"""What is in a folder that holds a run. Logs alone are of a run that never began."""


CURE = "name another folder with --out, or go on with it by --resume"


def require_posix() -> None:
    """``OSError`` on a system where real runs do not work."""
    if os.name != "posix":
        raise OSError(
            f"real runs need Linux or macOS, and this is {os.name!r}: start them in WSL or on another machine; the simulator "
            "(offbeat simulate, ob.simulate) works here"
        )


class Busy(ValueError):
    """Another process writes to the folder."""


def holds_run(folder: Path) -> bool:
    """Whether the folder has the results of a run, or a part of them."""
    return any(next(folder.glob(name), None) is not None for name in RESULTS)


def choose(
    named: Path | None,
    default: Path,
    resume: bool = False,
    same: Callable[[Path], bool] = lambda folder: False,
    cure: str = CURE,
    taken: Collection[Path] = (),
) -> Path:
    """The folder for a run: the one that the user has ``named``, or the first free one of ``default``, default-2, default-3, ...

    Free is what holds no run, or the ``same`` one, and is not ``taken``. With ``resume`` it is the one that is named, or the last
    that holds a run. ``ValueError`` with the ``cure`` where the folder that is named holds another run.
    """
    if named is not None:
        if holds_run(named) and not resume and not same(named):
            raise ValueError(f"{named} holds a run already: {cure}")
        return named
    folders = list(_numbered(default))
    if resume:
        return next((f for f in reversed(folders) if holds_run(f)), default)
    return next(f for f in folders if f not in taken and (not holds_run(f) or same(f)))


def claim(
    named: Path | None, default: Path, who: str, make: Callable[[Path], Path], resume: bool = False, cure: str = CURE
) -> tuple[Path, IO[Any]]:
    """The folder that `choose` gives, made by ``make``, and the `lock` on it; of default folders the first that nobody uses."""
    require_posix()
    taken: set[Path] = set()
    while True:
        folder = choose(named, default, resume, cure=cure, taken=taken)
        try:
            return folder, lock(make(folder), who)
        except Busy:
            if named is not None or resume:
                raise
            taken.add(folder)


def lock(folder: Path, who: str) -> IO[Any]:
    """An open file whose lock says that ``who`` writes to the folder; `Busy` where another process has it."""
    file = open(folder / f".{who}.lock", "a+")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            number = file.read().strip()
            file.close()
            raise Busy(f"{folder} is in use by another offbeat {who}, process {number}: name another folder") from None
        except OSError:
            pass  # a file system without locks
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _numbered(default: Path) -> Iterator[Path]:
    """``default`` and those that are numbered after it, up to one beyond the last that is there."""
    last = max((n for path in default.parent.glob(f"{default.name}-*") if (n := _number(path, default))), default=1)
    yield default
    yield from (default.with_name(f"{default.name}-{n}") for n in range(2, last + 2))


def _number(path: Path, default: Path) -> int:
    text = path.name[len(default.name) + 1 :]
    return int(text) if text.isdecimal() and path.is_dir() else 0
