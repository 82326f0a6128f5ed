"""A module's trainable parameters as one vector [d], read from them and written into them: they stay the module's own."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.graph import increment_version

from ..tasks.flat import check, local

if os.name == "posix":
    _memcmp = ctypes.CDLL(None).memcmp
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    # Three times as fast as torch.equal, which has no loop of its own for a difference; moving takes a fifth of the time of
    # copy_ where tensors are of some hundred numbers.
SMALL = 1 << 18
"""Bytes of a model up to which memory is moved without torch, whose threads are of no use there."""


class Parameters:
    """The trainable parameters of ``module`` in the order of ``module.parameters()``, each row-major, once each.

    They are chosen here, once. Of `DTensor`s, such as ``fully_shard`` makes, the vector is this rank's shards. Raises
    ``ValueError`` as `Flat` does.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        check(module, named)
        self.names = [name for name, _ in named]
        self.tensors: list[Tensor] = [p for _, p in named]
        self.whole = not any(hasattr(p, "to_local") for p in self.tensors)
        """Whether this process has all of each parameter."""
        first = local(self.tensors[0])
        self._dtype, self._device = first.dtype, first.device
        self._shapes = [local(p).shape for p in self.tensors]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._bytes = [size * first.element_size() for size in self._sizes]
        self._mapped = os.name == "posix" and self.whole and first.is_cpu
        self._small = self._mapped and sum(self._bytes) <= SMALL
        self.held = self.read()
        """What was read or written last, ``Tensor[d]``; nobody writes into it."""

    def read(self) -> Tensor:
        """The parameters, a vector of the caller's own. [d]"""
        with torch.no_grad():
            self.held = _flat(self._local())
        return self.held

    def write(self, x: Tensor) -> None:
        """Put ``x`` [d] into the module."""
        if self._small and all(map(self._plain, self.tensors, self._bytes)) and self._like(x):
            at = x.data_ptr()
            for p, size in zip(self.tensors, self._bytes, strict=True):
                ctypes.memmove(p.data_ptr(), at, size)
                at += size
            increment_version(self.tensors)  # so that autograd sees it, as it does any other change
        else:
            with torch.no_grad():
                parts = self._local()
                torch._foreach_copy_(parts, _unflatten_dense_tensors(x, parts))  # type: ignore[no-untyped-call]
        self.held = x

    def parts(self, x: Tensor) -> list[Tensor]:
        """``x`` [d] as views, each of the shape of its parameter."""
        return [t.view(shape) for t, shape in zip(torch.split(x, self._sizes), self._shapes, strict=True)]

    def hold(self, x: Tensor) -> None:
        """`write`, but for the tensor that was read or written last."""
        if x is not self.held:
            self.write(x)

    def touched(self) -> list[str]:
        """The names of the parameters whose numbers are no longer those that were read or written last.

        The numbers themselves are compared: ``p.data.clamp_()`` and ``p.data = t`` change no version. On the CPU bit by bit;
        on a GPU in one kernel and one wait where nothing has changed. Raises ``RuntimeError`` for a parameter that was moved,
        cast or given another shape.
        """
        x = self.held
        if self._mapped and self._like(x):
            at = x.data_ptr()
            for p, size in zip(self.tensors, self._bytes, strict=True):
                if not self._plain(p, size) or _memcmp(p.data_ptr(), at, size):
                    break
                at += size
            else:
                return []
        return self._touched(x)

    @torch.no_grad()
    def _touched(self, x: Tensor) -> list[str]:
        parts = self._local()
        for name, part, shape in zip(self.names, parts, self._shapes, strict=True):
            if part.dtype is not self._dtype or part.device != self._device or part.shape != shape:
                raise RuntimeError(
                    f"parameter {name} is {part.dtype} on {part.device} of shape {tuple(part.shape)}, and was {self._dtype} "
                    f"on {self._device} of shape {tuple(shape)} when its Replica was made: move, cast or resize the module "
                    "first, then make the Replica"
                )
        if not self._mapped and torch.equal(_flat(parts), x):
            return []
        old = torch.split(x, self._sizes)
        return [name for name, a, b in zip(self.names, parts, old, strict=True) if not _same(a.reshape(-1), b)]

    @torch.no_grad()
    def gradient(self, out: Tensor | None = None) -> Tensor:
        """The gradients, 0 for a parameter that has none, in ``out`` or in new memory: call it after ``backward()``. [d]"""
        parts = []
        for p in self.tensors:
            g = p.grad
            if g is None:
                g = torch.zeros_like(local(p))
            elif not self.whole:
                g = local(g)
            parts.append(g if g.layout is torch.strided else g.to_dense())
        return _flat(parts) if out is None else torch.cat([part.reshape(-1) for part in parts], out=out)

    def scale_gradients(self, scale: Tensor) -> None:
        """Divide each gradient by ``scale``, 0-dim, where it is."""
        for p in self.tensors:
            if p.grad is not None:
                g = local(p.grad)
                g.div_(scale.to(g))

    @torch.no_grad()
    def put_gradient(self, g: Tensor) -> None:
        """Make ``g`` [d] the gradients of the parameters, each a dense one of its own."""
        parts = torch.split(g.clone(), self._sizes)
        for p, part, shape in zip(self.tensors, parts, self._shapes, strict=True):
            if self.whole:
                p.grad = part.view(shape)
            else:
                p.grad = torch.zeros_like(p)
                local(p.grad).copy_(part.view(shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or make them 0."""
        for p in self.tensors:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad = p.grad.detach().zero_()

    def _local(self) -> list[Tensor]:
        """This process's part of each parameter."""
        return self.tensors if self.whole else [local(p) for p in self.tensors]

    def _plain(self, p: Tensor, size: int) -> bool:
        """Whether a parameter is row-major in memory, and as it was when it was chosen."""
        return p.is_contiguous() and p.nbytes == size and p.dtype is self._dtype and p.is_cpu

    def _like(self, x: Tensor) -> bool:
        """Whether a vector is in memory as the parameters are."""
        return x.is_cpu and x.is_contiguous() and x.dtype is self._dtype


def _flat(parts: list[Tensor]) -> Tensor:
    """Their numbers in one vector, in memory of its own."""
    if len(parts) == 1:  # of which torch would make a view
        return parts[0].reshape(-1).clone()
    flat: Tensor = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
    return flat


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors are the same; what is no number is the same as itself."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
