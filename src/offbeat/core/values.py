"""Values: frozen dataclasses that check themselves, print themselves, and can be read back from what they print.

Methods, schedules, problems and clusters are all values. Their ``repr`` is Python that rebuilds them; `parse` reads it
back without ever running code, so that a trace from somebody else can be opened safely.
"""

from __future__ import annotations

import ast
import difflib
import math
import numbers
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, NoReturn

_ALONE = threading.Lock()  # Python 3.11's parser fails now and then when two threads use it at once


def refuse(owner: object, field: str, value: object, cure: str) -> NoReturn:
    """Raise a ``ValueError`` that names the class, the field, the value and the cure."""
    raise ValueError(f"{type(owner).__name__}.{field} = {value!r}: {cure}")


def require(owner: object, field: str, ok: bool, cure: str) -> None:
    """`refuse` the field's present value unless ``ok``; write ``ok`` so that it is False for nan."""
    plain(owner, field)
    if not ok:
        refuse(owner, field, getattr(owner, field), cure)


def plain(owner: object, field: str) -> Any:
    """The field's value, where its numbers are Python's own from now on: another library's, such as numpy's, are printed in
    words of their own, which the other end of a run could not read."""
    value = getattr(owner, field)
    number = _plain(value)
    if number is not value:
        object.__setattr__(owner, field, number)
    return number


def _plain(value: Any) -> Any:
    if type(value) is tuple:
        parts = tuple(map(_plain, value))
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def require_nonnegative(owner: object, field: str) -> None:
    """Refuse a number that is not finite or is below 0."""
    require(owner, field, 0 <= getattr(owner, field) < math.inf, "must be finite and at least 0")


def require_count(owner: object, field: str, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    value = plain(owner, field)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(owner, field, whole, f"must be a whole number, at least {least}")


def require_kind(owner: object, field: str, kind: type, example: str) -> None:
    """Refuse what is no ``kind``."""
    require(owner, field, isinstance(getattr(owner, field), kind), f"must be a {kind.__name__} such as {example}")


def unknown(what: str, name: str, known: Mapping[str, object] | list[str]) -> str:
    """The message for a name that nobody knows: the nearest known names, or all where none is near or they are few."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    listed = f"known are {', '.join(sorted(known))}" if not near or len(known) <= 12 else ""
    return f"unknown {what} {name!r}: {' '.join(filter(None, (hint, listed)))}"


def parse(text: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    """The value that ``text`` (a ``repr``) describes: literals and calls of the constructors in ``names``, nothing else.

    Raises ``ValueError`` with the offending part for anything that is neither. Text from a stranger costs no more time and
    memory than its length, and warns of nothing.
    """
    short = _beginning(text)
    try:
        with _ALONE, warnings.catch_warnings():
            for doubtful in (SyntaxWarning, DeprecationWarning):  # of what no repr has, such as '\d' or 1or 2
                warnings.simplefilter("error", doubtful)
            tree = ast.parse(text.strip().replace("\0", "\\0"), mode="eval")  # of a NUL some Pythons say something else
        return _build(tree.body, short, names)
    except SyntaxError as error:
        raise ValueError(f"cannot read the value {short!r}: {error.msg}") from None
    except (TypeError, ArithmeticError) as error:  # a constructor was called with what it does not take
        raise ValueError(f"cannot read the value {short!r}: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"cannot read the value {text[:40]!r}...: it is nested too deeply") from None


def _shown(node: ast.expr) -> str:
    """The part of a text that cannot be read, or its beginning."""
    return _beginning(ast.unparse(node))


def _beginning(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _build(node: ast.expr, text: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or any(k.arg is None for k in node.keywords):
            raise ValueError(f"cannot read {_shown(node)!r} in {text!r}: only plain constructor calls are allowed")
        if node.func.id not in names:
            raise ValueError(unknown("constructor", _beginning(node.func.id), dict(names)))
        args = [_build(a, text, names) for a in node.args]
        return names[node.func.id](*args, **{str(k.arg): _build(k.value, text, names) for k in node.keywords})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # 0.1 * Warmup(500)
        factors = _build(node.left, text, names), _build(node.right, text, names)
        if not all(
            isinstance(f, int | float) or is_dataclass(f) for f in factors
        ):  # not [0], of which it makes as many
            raise ValueError(f"cannot read {_shown(node)!r}: only numbers and schedules can be multiplied")
        return factors[0] * factors[1]
    if isinstance(node, ast.Tuple):
        return tuple(_build(e, text, names) for e in node.elts)
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):  # how Python prints these two floats
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        return -_build(node.operand, text, names)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"cannot read {_shown(node)!r} in {text!r}: it is no literal and no known value") from None
