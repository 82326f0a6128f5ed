"""What is trained: problems over real models and data, each a function of one flat parameter vector."""

from __future__ import annotations

from ..core.problem import Problem
from .data import DataCorrupt, DataDiffers, DataMissing
from .digits import Digits
from .flat import Flat
from .mnist import Mnist
from .quadratic import Quadratic
from .supervised import Recipe, Supervised, accuracy

TASKS: dict[str, type[Problem]] = {"digits": Digits, "mnist": Mnist, "quadratic": Quadratic}
"""The library's problems by their name on the command line."""

__all__ = [
    "TASKS",
    "DataCorrupt",
    "DataDiffers",
    "DataMissing",
    "Digits",
    "Flat",
    "Mnist",
    "Quadratic",
    "Recipe",
    "Supervised",
    "accuracy",
]
