"""What is trained: problems over real models and data, each a function of one flat parameter vector."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from ..core.problem import Problem
from .cifar import Cifar10, Cifar100
from .data import DataCorrupt, DataDiffers, DataMissing, Where
from .digits import Digits
from .flat import Flat
from .imagenet import ImageNet
from .language import TinyShakespeare, WikiText2, WikiText103
from .mnist import Mnist
from .quadratic import Quadratic
from .supervised import Recipe, Supervised, accuracy
from .time_only import TimeOnly
from .translation import Multi30k, Wmt16EnDe

TASKS: dict[str, type[Problem]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "digits": Digits,
    "imagenet": ImageNet,
    "mnist": Mnist,
    "multi30k": Multi30k,
    "quadratic": Quadratic,
    "timeonly": TimeOnly,
    "tinyshakespeare": TinyShakespeare,
    "wikitext103": WikiText103,
    "wikitext2": WikiText2,
    "wmt16ende": Wmt16EnDe,
}
"""The library's problems by their name on the command line."""


class Entry(NamedTuple):
    """What a list of tasks says of one."""

    name: str
    """Its name on the command line."""
    task: type[Problem]
    """Its class."""
    summary: str
    """One line: what it is."""
    where: Where | None
    """Its files, where they were looked for and which are there; None if it needs none."""


def catalogue() -> list[Entry]:
    """Every task of the library with its data, in the order of their names; looks for files, but reads none."""
    return [
        Entry(
            name=name,
            task=task,
            summary=(inspect.getdoc(task) or "").partition("\n")[0],
            where=task.data() if issubclass(task, Recipe) else None,
        )
        for name, task in sorted(TASKS.items())
    ]


__all__ = [
    "TASKS",
    "Cifar10",
    "Cifar100",
    "DataCorrupt",
    "DataDiffers",
    "DataMissing",
    "Digits",
    "Entry",
    "Flat",
    "ImageNet",
    "Mnist",
    "Multi30k",
    "Quadratic",
    "Recipe",
    "Supervised",
    "TimeOnly",
    "TinyShakespeare",
    "Where",
    "WikiText2",
    "WikiText103",
    "Wmt16EnDe",
    "accuracy",
    "catalogue",
]
