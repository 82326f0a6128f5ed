"""Running statistics of batch norm that fit the parameters which a run would ship.

A worker's own were taken at the points of its gradients, which need not be near: DANA's is a look-ahead. So its last minibatches are
remembered, and the model goes through them once more when it holds the shipped parameters, as `torch.optim.swa_utils.update_bn` lets it
do with a loader.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MINIBATCHES = 20
"""How many calls are remembered at most."""
BYTES = 256 << 20
"""How many bytes the tensors of these calls have at most, but for those of the last one."""


class Call(NamedTuple):
    """A call of the model in training, with its arguments as they are: they are not copied."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None  # the type of device, and what it is cast to
    bytes: int


class Statistics:
    """The running statistics of ``model``, and the calls in training that it was last given."""

    def __init__(self, model: nn.Module, log: logging.Logger) -> None:
        """Costs nothing where no layer of the model has running statistics."""
        self.model, self.log = model, log
        self.layers = [module for module in model.modules() if _tracks(module)]
        self.learning = self.layers
        """Those that were in training at the last call, as others are frozen."""
        self.calls: deque[Call] = deque()
        self.hook = model.register_forward_pre_hook(_Hook(self), with_kwargs=True) if self.layers else None

    def take(self, several: Callable[[int], int] = lambda count: count) -> None:
        """Take the statistics anew, at the parameters that the model has now: the mean over the minibatches that are remembered.

        All other buffers, the numbers of minibatches and random numbers stay as they are. Where the model fails, it is said, and the
        statistics stay as well. ``several`` says of a number of minibatches how many all ranks of a worker can go through.
        """
        wanted = several(len(self.calls)) if self.layers else 0
        calls, layers = list(self.calls)[len(self.calls) - wanted :], self.learning
        if not calls or not layers:
            return
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        devices = {buffer.device for buffer in before.values() if buffer.device.type == "cuda"}
        try:
            with torch.random.fork_rng(list(devices)), torch.no_grad(), _averaging(layers):
                for call in calls:
                    with _cast(call.autocast):
                        self.model(*call.args, **call.kwargs)
        except Exception as error:
            what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.log.warning(
                f"batch norm: the statistics stay this worker's own, as the model could not be called again ({what})"
            )
            self.calls.clear()
            kept = set[int]()
        else:
            kept = {id(t) for layer in layers for t in (layer.running_mean, layer.running_var)}
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if id(buffer) not in kept and name in before:
                    buffer.copy_(before[name])

    def forget(self) -> None:
        """The worker has left: nothing is remembered any more."""
        self.calls.clear()
        if self.hook is not None:
            self.hook.remove()

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model was called in training."""
        self.learning = [layer for layer in self.layers if layer.training]
        tensors = list(_tensors((args, kwargs)))
        kind = tensors[0].device.type if tensors else "cpu"
        cast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        self.calls.append(Call(args, kwargs, cast, sum(t.nbytes for t in tensors)))
        while len(self.calls) > 1 and (len(self.calls) > MINIBATCHES or sum(call.bytes for call in self.calls) > BYTES):
            self.calls.popleft()


class _Hook:
    """Tells `Statistics` of calls in training. A copy of the model, or what is saved of it, has a hook in its place that does nothing."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = weakref.ref(statistics)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
            statistics = self.statistics()
            if statistics is not None:
                statistics.remember(args, kwargs)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, returns nothing, and is Python's own


def _tracks(module: nn.Module) -> bool:
    """Whether the module has running statistics, as all kinds of batch norm have."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and bool(module.track_running_stats) and module.running_mean is not None


@contextlib.contextmanager
def _averaging(layers: list[Any]) -> Iterator[None]:
    """Inside, the layers' statistics are the mean over all minibatches from now on, each with the same weight."""
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True
        yield
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training


def _cast(autocast: tuple[str, torch.dtype] | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(autocast[0], autocast[1]) if autocast else contextlib.nullcontext()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
