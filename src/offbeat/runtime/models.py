"""What a script trains: one module, or several that are trained together, such as the two of a GAN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

Model = nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module]
"""A module, or modules by their names, or in an order: parameters of several are ``name.weight``, or ``0.weight``."""


def one_module(model: Model, ranks: bool) -> nn.Module:
    """``model`` as one module, without `DistributedDataParallel` around it or its parts, which only ``ranks`` of a group have.

    Raises ``TypeError`` for what is none, and ``ValueError`` for a wrapped one without a group.
    """
    if isinstance(model, nn.Module):
        return _unwrapped(model, ranks)
    several = isinstance(model, Mapping)
    parts: Any = dict(model) if isinstance(model, Mapping) else dict(enumerate(_sequence(model)))
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            raise TypeError(f"model[{name!r}] = {str(part)[:100]}: must be a module")
        parts[name] = _unwrapped(part, ranks)
    return nn.ModuleDict(parts) if several else nn.ModuleList(parts.values())


def called(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` that a script calls: itself, or those that it only holds."""
    if isinstance(model, nn.ModuleDict | nn.ModuleList):
        for part in model.children():
            yield from called(part)
    else:
        yield model


def _sequence(model: Any) -> Sequence[nn.Module]:
    if not isinstance(model, Sequence) or isinstance(model, str):
        raise TypeError(f"model = {str(model)[:100]}: must be a module, or a dictionary or list of modules")
    return model


def _unwrapped(model: nn.Module, ranks: bool) -> nn.Module:
    if not isinstance(model, DistributedDataParallel):
        return model
    if not ranks:
        raise ValueError(
            "the model is in DistributedDataParallel: name the process group of its ranks, as in group=dist.group.WORLD, "
            "if they are to be one worker; if each is to be one, give and train the module inside"
        )
    inside: nn.Module = model.module
    return inside
