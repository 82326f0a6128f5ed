"""Flattening: a module's parameters as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Flat:
    """Makes a module's trainable parameters views of one vector, ``data``: writing to it changes the module.

    It is ``Tensor[d]`` of the parameters' dtype and device. The order is that of ``module.parameters()``, each parameter
    row-major, so that equal models have equal vectors whatever their memory format, and ``vector_to_parameters`` of
    ``torch.nn.utils`` reads the vector into another copy of a model that has nothing frozen. This is for a module that
    nobody else trains or saves; a `Replica` copies instead, and leaves a user's parameters where they are.

    - A parameter with ``requires_grad=False`` is left out: the module keeps it as it is. The choice is made here, once:
      freeze or unfreeze before, not after (a parameter frozen later stays in, with gradient 0).
    - A parameter used in several places (tied weights) appears once.
    - A parameter in another memory format (``channels_last``) becomes contiguous; its values and results stay.
    - Buffers (running statistics) are no parameters and are left out.

    Raises ``ValueError`` for a module without trainable parameters, with complex ones, with parameters of several dtypes or
    devices, with parameters that have no shape yet, or with distinct parameters in the same memory.
    """

    data: Tensor
    """The parameters, ``Tensor[d]``."""

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        check(module, named)
        first = named[0][1]
        sizes = [p.numel() for _, p in named]
        self.data = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self.parameters = [p for _, p in named]
        """The parameters that are in it, in their order."""
        for p, part in zip(self.parameters, torch.split(self.data, sizes), strict=True):
            data = part.view(p.shape)
            data.copy_(p.detach())
            p.data = data

    def take_gradient(self) -> Tensor:
        """The gradients, the caller's own: the parameters have none afterwards, so that nothing need be added up. [d]

        Call it after ``backward()``, before and after which no parameter has one. One that is missing counts as 0.
        """
        parts = []
        for p in self.parameters:
            g = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            parts.append((g if g.layout is torch.strided else g.to_dense()).reshape(-1))
            p.grad = None
        return torch.cat(parts)


def local(t: Tensor) -> Tensor:
    """The part of ``t`` that this process has."""
    return t.to_local() if hasattr(t, "to_local") else t  # a DTensor, without importing what makes one


def check(module: nn.Module, named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse, with a ``ValueError``, trainable parameters that cannot be one vector."""
    kind = type(module).__name__
    if not named:
        raise ValueError(f"{kind} has no trainable parameters: give a module with requires_grad=True somewhere")
    if lazy := [name for name, p in named if is_lazy(p)]:
        raise ValueError(
            f"{kind} has parameters without a shape ({', '.join(lazy)}): run the module on one batch first, "
            "or name the sizes instead of using Lazy layers"
        )
    if complex_ := [name for name, p in named if p.is_complex()]:
        raise ValueError(
            f"{kind} has complex parameters ({', '.join(complex_)}): messages and rules are of real numbers. Keep a real "
            "parameter, torch.view_as_real of it, and take torch.view_as_complex in forward"
        )
    first_name, first = named[0]
    if odd := [f"{name} is {p.dtype} on {p.device}" for name, p in named if _place(p) != _place(first)]:
        raise ValueError(
            f"{kind} mixes dtypes or devices: {first_name} is {first.dtype} on {first.device}, but {', '.join(odd)}. "
            "Bring the trainable parameters together with module.to(device, dtype), or freeze the others"
        )
    seen: dict[int, str] = {}
    for name, p in named:
        if local(p).numel() and (other := seen.setdefault(local(p).data_ptr(), name)) != name:
            raise ValueError(
                f"{kind}.{name} and {kind}.{other} are two parameters in the same memory: "
                "tie them by assigning one Parameter to both"
            )


def _place(p: Tensor) -> tuple[torch.dtype, torch.device]:
    return p.dtype, p.device
