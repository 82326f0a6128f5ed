"""JSON as the standard has it: what is no finite number is written as null, and read back as nan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON. ``ValueError`` never comes of a number: nan and the infinities, which JSON has not, are null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def numbers(read: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers as they were before `dumps`: null is nan."""
    return {name: math.nan if value is None else value for name, value in read.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
