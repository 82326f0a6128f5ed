"""A model's layout: the name and the shape of each parameter, in the order in which they lie in the vector."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

WRAPPERS = {
    "_orig_mod": ("OptimizedModule",),
    "_forward_module": ("_FabricModule",),
    "module": ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"),
}
"""Under which attribute a wrapper keeps the user's module, and which classes are such wrappers: torch.compile, Lightning Fabric,
and those whose attribute's name a user may have as well."""


class ParameterEntry(NamedTuple):
    """One parameter."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name[:200]} {list(self.shape)}"


Layout = list[ParameterEntry]


def plain_name(model: nn.Module, name: str) -> str:
    """The name that a parameter or buffer ``name`` of ``model`` has in the user's own module, without what wrappers add.

    ``"_orig_mod.0.weight"`` of a compiled module is ``"0.weight"``. A user's own attribute ``module`` stays.
    """
    words, here = [], model
    for word in name.split("."):
        if type(here).__name__ not in WRAPPERS.get(word, ()):
            words.append(word)
        here = getattr(here, word)
    return ".".join(words)


def layout_of(model: nn.Module) -> Layout:
    """The layout of the model's trainable parameters, as the user's own module names them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [ParameterEntry(plain_name(model, name), tuple(p.shape)) for name, p in named]


def read(given: Any) -> Layout:
    """The layout that another process has told, as JSON; empty where it tells none or what it tells makes no sense."""
    try:
        entries = [ParameterEntry(name, tuple(shape)) for name, shape in given]
    except (TypeError, ValueError):
        return []
    well = all(isinstance(e.name, str) and all(type(n) is int and n >= 0 for n in e.shape) for e in entries)
    return entries if well else []


def difference(theirs: Layout, ours: Layout) -> str:
    """How the worker's layout first differs from the run's, for a message; empty where it does not."""
    for k in range(max(len(theirs), len(ours))):
        worker, run = (layout[k] if k < len(layout) else "none" for layout in (theirs, ours))
        if worker != run:
            return f"parameter {k} is {worker} in the worker's model and {run} in the run's"
    return ""
