"""Flattening: a module's parameters as one vector, and their gradients as another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Flat:
    """Makes a module's trainable parameters views of one vector, and their ``.grad`` views of a second one.

    Writing to ``data`` changes the module, and ``backward()`` adds to ``grad``: nothing is copied. Both are
    ``Tensor[d]`` of the parameters' dtype and device. The order is that of ``module.parameters()``, each parameter
    row-major, so that equal models have equal vectors whatever their memory format, and ``vector_to_parameters`` of
    ``torch.nn.utils`` reads the vector into another copy of a model that has nothing frozen. The module works as
    before, with any optimizer; gradients that it holds already are kept.

    - A parameter with ``requires_grad=False`` is left out: the module keeps it as it is. The choice is made here, once:
      freeze or unfreeze before, not after (a parameter frozen later stays in, with gradient 0).
    - A parameter used in several places (tied weights) appears once.
    - A parameter in another memory format (``channels_last``) becomes contiguous; its values and results stay.
    - Buffers (running statistics) are no parameters and are left out.

    Raises ``ValueError`` for a module without trainable parameters, with parameters of several dtypes or devices, with
    parameters that have no shape yet, or with distinct parameters in the same memory.
    """

    data: Tensor
    """The parameters, ``Tensor[d]``."""

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _check(module, named)
        first = named[0][1]
        sizes = [p.numel() for _, p in named]
        self.data = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._grad: Tensor | None = None
        self._views: list[Tensor] = []  # of it, one for each parameter
        self._held: Tensor | None = None
        self._parts: list[tuple[str, nn.Parameter, Tensor]] = []
        for (name, p), part in zip(named, torch.split(self.data, sizes), strict=True):
            data = part.view(p.shape)
            data.copy_(p.detach())
            p.data = data
            self._parts.append((name, p, data))
        self.gather()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are in it, in their order."""
        return [p for _, p, _ in self._parts]

    @property
    def grad(self) -> Tensor:
        """Their gradients, ``Tensor[d]``; call `gather` before reading it."""
        if self._grad is None:
            self._collect(torch.zeros_like(self.data))
        assert self._grad is not None
        return self._grad

    def read(self) -> Tensor:
        """The parameters, the caller's own. [d]"""
        self._held = self.data.clone()
        return self._held

    def write(self, x: Tensor) -> None:
        """Put ``x`` [d] into the module."""
        self.data.copy_(x)
        self._held = x

    def hold(self, x: Tensor) -> None:
        """`write`, but for the tensor that was read or written last: it is there, as long as nobody writes into tensors."""
        if x is not self._held:
            self.write(x)

    def gradient(self) -> Tensor:
        """The gradients, the caller's own: call it after ``backward()``. [d]"""
        return self.gather().clone()

    def take_gradient(self) -> Tensor:
        """The gradients, the caller's own: the parameters have none afterwards, so that nothing need be added up. [d]

        Call it after ``backward()``, before and after which no parameter has one.
        """
        parts = []
        for _, p, data in self._parts:
            g = torch.zeros_like(data) if p.grad is None else p.grad.detach()
            parts.append((g if g.layout is torch.strided else g.to_dense()).reshape(-1))
            p.grad = None
        return torch.cat(parts)

    def put_gradient(self, g: Tensor) -> None:
        """Make ``g`` [d] the gradients of the parameters; it may be what `gather` gave."""
        if g is not self.grad:
            self.gather()
            self.grad.copy_(g)

    def collect_in(self, grad: Tensor) -> None:
        """Make ``grad`` [d] the vector of the gradients, which it then holds."""
        grad.copy_(self.gather())
        self._collect(grad)
        for p, view in zip(self.parameters, self._views, strict=True):
            p.grad = view

    def _collect(self, grad: Tensor) -> None:
        parts = torch.split(grad, [p.numel() for p in self.parameters])
        self._grad, self._views = grad, [part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)]

    def zero_grad(self) -> None:
        """Make all gradients 0."""
        self.grad.zero_()

    def drop_grad(self) -> None:
        """Let parameters have no gradients, and keep no memory for them: `backward()` makes new ones, outside of `grad`."""
        self._grad, self._views = None, []
        for _, p, _ in self._parts:
            p.grad = None

    def complete(self) -> None:
        """Let each parameter have a gradient, wherever it is: one that is missing is 0. Raises as `gather` does."""
        for name, p, data in self._parts:
            _check_place(name, p, data)
            if p.grad is None:
                p.grad = torch.zeros_like(data)

    def gather(self) -> Tensor:
        """The vector ``grad`` once it holds every parameter's gradient: call it after ``backward()``.

        Costs almost nothing where the gradients are still views of it. One that is not, because
        ``zero_grad(set_to_none=True)`` dropped it (the default of every optimizer) and ``backward()`` made another, is
        copied in and made a view again; one that is missing counts as 0. Raises ``RuntimeError`` where a parameter
        itself has left the vector.
        """
        whole = self.grad
        for (name, p, data), grad in zip(self._parts, self._views, strict=True):
            _check_place(name, p, data)
            if p.grad is grad:
                continue
            if p.grad is None:
                grad.zero_()
            else:
                new = p.grad.detach()
                grad.copy_(new if new.layout is torch.strided else new.to_dense())
            p.grad = grad
        return whole


class Sharded:
    """A module whose parameters are `DTensor`s, such as ``fully_shard`` makes: this rank's shards as one vector.

    They stay where the module has them, so reading and writing copies. Raises ``ValueError`` as `Flat` does.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _check(module, named)
        self.parameters = [p for _, p in named]
        self._sizes = [local(p).numel() for p in self.parameters]
        self._held: Tensor | None = None

    def read(self) -> Tensor:
        self._held = torch.cat([local(p).detach().reshape(-1) for p in self.parameters])
        return self._held

    def write(self, x: Tensor) -> None:
        for p, part in zip(self.parameters, torch.split(x, self._sizes), strict=True):
            local(p).detach().copy_(part.view(local(p).shape))
        self._held = x

    def hold(self, x: Tensor) -> None:
        if x is not self._held:
            self.write(x)

    def gradient(self) -> Tensor:
        grads = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self.parameters]
        return torch.cat([g.detach().reshape(-1) for g in grads])

    gather = gradient  # which shards are not views of

    def put_gradient(self, g: Tensor) -> None:
        for p, part in zip(self.parameters, torch.split(g, self._sizes), strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            local(p.grad).copy_(part.view(local(p).shape))

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    drop_grad = zero_grad

    def complete(self) -> None:
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)


def flatten(module: nn.Module) -> Flat | Sharded:
    """The parameters of ``module`` as one vector, whichever way it holds them."""
    return Sharded(module) if any(hasattr(p, "to_local") for p in module.parameters()) else Flat(module)


def local(t: Tensor) -> Tensor:
    """The part of ``t`` that this process has."""
    return t.to_local() if hasattr(t, "to_local") else t  # a DTensor, without importing what makes one


def _check_place(name: str, p: Tensor, data: Tensor) -> None:
    """Moved or cast, a module would train apart from its vector, and nothing else would tell."""
    if p.data_ptr() != data.data_ptr():
        raise RuntimeError(
            f"parameter {name} has left its flat vector: the module was moved, cast or flattened again. "
            "Move or cast it first (module.to(...)), then flatten it, once"
        )


def _check(module: nn.Module, named: list[tuple[str, nn.Parameter]]) -> None:
    kind = type(module).__name__
    if not named:
        raise ValueError(f"{kind} has no trainable parameters: give a module with requires_grad=True somewhere")
    if lazy := [name for name, p in named if is_lazy(p)]:
        raise ValueError(
            f"{kind} has parameters without a shape ({', '.join(lazy)}): run the module on one batch first, "
            "or name the sizes instead of using Lazy layers"
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
