"""A device that is not the CPU, for tests on machines without one.

Its tensors are ordinary ones of torch's spare backend, on a device named ``fake``. Their numbers lie in the host's memory, at
addresses that are off by `APART`: what reads them as if they were on the host is killed by the system, as with a GPU's
addresses. Operations are those of the CPU, to the bit, called by `_run`. So what fails on a GPU fails here: operands of both
devices, `Tensor.numpy`, a pointer given to the host or to gloo. All of it holds in every thread, autograd's included.

What it does not show: the order of streams (every operation is done when it returns), pinned memory, generators of random
numbers of the device, and kernels of CUDA itself, such as its fused optimizers.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration, dlpack
from torch.utils._pytree import tree_map

NAME = "fake"
APART = 1 << 62
"""How far addresses are from those of the host, in bytes: nothing is mapped there."""
CPU, SPARE = 1, 12
"""Kinds of devices in DLPack."""
moved: Counter[str] = Counter()
"""How often numbers went "to the device" and "to the host", the values of `Tensor.item` included."""
seeded: list[int] = []
"""The seeds that `torch.manual_seed` has given to the device's generators."""

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Head(ctypes.Structure):
    """The beginning of a DLPack tensor."""

    _fields_ = (("data", ctypes.c_uint64), ("kind", ctypes.c_int32), ("number", ctypes.c_int32))


def _alias(t: Tensor, kind: int, offset: int) -> Tensor:
    """The same memory as a tensor of another kind of device."""
    capsule = dlpack.to_dlpack(t.detach())
    head = _Head.from_address(_pointer(capsule, b"dltensor"))
    head.kind = kind
    head.data = (head.data + offset) % (1 << 64) if head.data else 0
    alias: Tensor = torch._C._from_dlpack(capsule)
    return alias


def _on_host(t: Tensor) -> Tensor:
    return _alias(t, CPU, -APART) if t.numel() else torch.empty(t.shape, dtype=t.dtype)


def _on_device(t: Tensor) -> Tensor:
    return _alias(t, SPARE, APART)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation of which a tensor is on the device, or is to be."""
    theirs: list[tuple[Tensor, Tensor]] = []

    def enter(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == NAME:
            theirs.append((value, _on_host(value)))
            return theirs[-1][1]
        if isinstance(value, Tensor) and value.dim():
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({op})")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for t, alias in theirs:
            if alias is value:
                return t
        return _on_device(value)

    args, kwargs = tree_map(enter, (args, kwargs))
    kinds = [str(argument.type) for argument in op._schema.arguments]
    args = tuple(  # a number beside a tensor has become one, and comes here as a number again
        torch.tensor(arg, dtype=theirs[0][1].dtype) if kind == "Tensor" and isinstance(arg, int | float) else arg
        for arg, kind in zip(args, kinds, strict=False)
    )
    result = op(*args, **kwargs)
    for t, alias in theirs:
        if alias.shape != t.shape:  # an operation that makes its result as long as it must be
            t.data = _on_device(alias)
    moved["to the host"] += op is torch.ops.aten._local_scalar_dense.default
    return tree_map(leave, result)


def _copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The only operation between both."""
    here, there = (t.device.type == NAME for t in (to, source))
    if here != there:
        moved["to the device" if here else "to the host"] += 1
    (_on_host(to) if here else to).copy_(_on_host(source) if there else source)
    return to


class _Module(backend_registration._DummyBackendModule):
    """What is ``torch.cuda`` of a GPU. Not available, so that the process pins no memory for it."""

    def is_available(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        seeded.append(seed)


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


def install() -> torch.device:
    """The device. Call it before the process takes its first gradient, as autograd looks for devices then."""
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hooks())
        _libraries.extend((torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")))
        _libraries[0].fallback(_run, "PrivateUse1")
        _libraries[1].impl("copy_", _copy_, "PrivateUse1")
    return torch.device(NAME, 0)


_libraries: list[Any] = []
