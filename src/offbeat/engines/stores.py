"""Stores that go past the cache, for loops whose results are far larger than it.

An ordinary store first reads the line that it overwrites, so that a loop of two reads and a write moves four streams; one
past the cache moves three. Inductor has no option for these, but takes another backend in the place of its own, and its
kernels for the CPU are made to be derived from. On x86 alone: elsewhere the usual backend does all. Others see what was so
stored once a lock has been taken after it, and no thread or process learns of a result without one.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from typing import Any

import torch

STORES = {512: "_mm512_stream_ps", 256: "_mm256_stream_ps"}
"""How float32 is so stored, by the bits of a register, to which the address is aligned."""

PLAIN = re.compile(r"(\w+)\.store\(([^,]+)\);")
"""A store of a whole register: what is left over at the end says a count as well."""

_compiling = threading.local()
_alone = threading.Lock()
_registered: list[bool] = []


def known() -> bool:
    """Whether this torch, on this processor, can compile such loops."""
    with _alone:
        if not _registered:
            _registered.append(_register())
    return _registered[0]


def past_cache(loop: Callable[..., Any], *, options: dict[str, Any], **how: Any) -> Callable[..., Any]:
    """As `torch.compile`, for a ``loop`` which writes to float32 vectors of their own pages, where such stores are `known`.

    What other threads compile meanwhile stays as it would be.
    """
    # the cache on disk would take a loop with ordinary stores for this one
    compiled = torch.compile(loop, options={**options, "fx_graph_cache": False}, **how)

    def call(*args: Any) -> Any:
        _compiling.on = True
        try:
            return compiled(*args)
        finally:
            _compiling.on = False

    return call


def _register() -> bool:
    """A backend for the CPU that is the usual one but for what this module compiles; False where that cannot be."""
    try:
        from torch._inductor.codegen import common
        from torch._inductor.codegen.cpp import CppKernelProxy, CppScheduling, CppVecKernel
        from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, pick_vec_isa

        common.init_backend_registration()
        usual = common.device_codegens["cpu"]
        extensible = CppScheduling.kernel_proxy_cls, CppKernelProxy.vec_kernel_cls, CppVecKernel._get_store_line
    except (ImportError, AttributeError, KeyError):
        return False
    isa = pick_vec_isa()
    if not extensible or not isinstance(isa, VecAVX2 | VecAVX512):
        return False

    class Vector(CppVecKernel):
        def _get_store_line(self, *args: Any, **options: Any) -> Any:
            code = super()._get_store_line(*args, **options)
            if 32 * self.tiling_factor != isa.bit_width():  # more than one register at a time
                return code
            return code.map(lambda line: PLAIN.sub(rf"{STORES[isa.bit_width()]}(\2, \1);", line))

    class Proxy(CppKernelProxy):
        vec_kernel_cls = Vector

    class Scheduling(CppScheduling):
        kernel_proxy_cls = Proxy

    def scheduling(scheduler: Any) -> Any:
        return (Scheduling if getattr(_compiling, "on", False) else usual.scheduling)(scheduler)

    common.device_codegens["cpu"] = dataclasses.replace(usual, scheduling=scheduling)
    return True
