"""The methods: one file is one paper. A file placed in this folder is discovered; nothing else needs to know of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from ..core.master import Correction
from ..core.method import Method
from ..core.values import unknown


def _discover() -> dict[str, type]:
    """Every public, concrete method and correction that a module of this folder defines, by class name."""
    found: dict[str, type] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__ and not name.startswith("_")
            if own and issubclass(cls, Method | Correction) and not inspect.isabstract(cls):
                if name in found:
                    raise ImportError(
                        f"{module.__name__}.{name}: {found[name].__module__} defines {name} too; rename one"
                    )
                found[name] = cls
    return found


_classes = _discover()
globals().update(_classes)
__all__ = sorted([*_classes, "all_methods", "find"])


def all_methods() -> list[type[Method]]:
    """Every concrete method class of this folder, by name on the command line."""
    return sorted((c for c in _classes.values() if issubclass(c, Method)), key=lambda c: c.name)


def find(name: str) -> type[Method]:
    """The method class of this name (``dana-zero``, ``DanaZero``); ``ValueError`` with the nearest names otherwise."""
    plain = name.replace("-", "").replace("_", "").lower()
    for cls in all_methods():
        if cls.name.replace("-", "") == plain:
            return cls
    raise ValueError(unknown("method", name, [c.name for c in all_methods()]))
