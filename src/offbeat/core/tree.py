"""Trees of tensors: what states and messages are. A tensor, or a tuple (named or not) or mapping of such trees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a message or of a state, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in _parts(tree) for leaf in leaves(part)]


def rebuild(like: Any, tensors: Iterable[Any]) -> Any:
    """What has the structure of ``like`` and these tensors (or what else is there for each)."""
    return _build(like, iter(tensors))


def _build(like: Any, rest: Iterator[Any]) -> Any:
    """(No closure that calls itself: such a cycle would hold the tensors until garbage is collected.)"""
    if isinstance(like, Tensor):
        return next(rest)
    if isinstance(like, Mapping):
        return {key: _build(part, rest) for key, part in like.items()}
    if not isinstance(like, tuple | list):
        return like
    parts = [_build(part, rest) for part in like]
    return like._make(parts) if hasattr(like, "_make") else tuple(parts)


def apart(tree: Any, lent: Any) -> Any:
    """``tree`` without memory of ``lent``, which somebody else will write to: what lies there is copied."""
    parts, theirs = leaves(tree), {t.untyped_storage().data_ptr() for t in leaves(lent)}
    if theirs.isdisjoint(t.untyped_storage().data_ptr() for t in parts):
        return tree
    return rebuild(tree, [t.clone() if t.untyped_storage().data_ptr() in theirs else t for t in parts])


def finite(tree: Any) -> bool:
    """Whether all numbers of a message or state are finite."""
    return all(_squares(t) < math.inf or bool(torch.isfinite(t).all()) for t in _numbers(tree))


def tame(tree: Any) -> bool:
    """Whether all numbers are finite and so far from overflow that a state's sums and squares of them are finite too."""
    return all(_squares(t) < 1e30 for t in _numbers(tree))


def _numbers(tree: Any) -> list[Tensor]:
    return [t for t in leaves(tree) if t.is_floating_point() and t.numel()]


def _squares(t: Tensor) -> float:
    """Their sum, which is fast: nan or inf where a number is, and maybe where a number is large."""
    if not t.dim():
        number = float(t)
        return number * number  # as a power it would raise where it overflows
    return float(torch.dot(t, t) if t.dim() == 1 else t.double().square().sum())


def _parts(tree: Any) -> tuple[Any, ...]:
    if isinstance(tree, Mapping):
        return tuple(tree.values())
    return tuple(tree) if isinstance(tree, tuple | list) else ()
