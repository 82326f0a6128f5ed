"""Schedulers of the learning rate that go by where the run is, not by this worker's own steps.

A plain script's scheduler counts its steps: ``OneCycleLR(optimizer, total_steps=epochs * len(loader))``. Of N workers each takes about an
N-th of the minibatches, so its own count would end at an N-th of the way; and a worker that is started again would begin anew.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .passes import Passes


def bring(scheduler: Any, due: int) -> None:
    """Step a scheduler of torch until it has taken ``due`` steps."""
    with warnings.catch_warnings():  # torch's, that its optimizer has taken no step so far: those of others count
        warnings.filterwarnings("ignore", "Detected call of")
        while scheduler.last_epoch < due:
            scheduler.step()


class RunScheduler:
    """A scheduler of torch whose ``step()`` brings it to where the run is, which ``due`` says. All else is the scheduler's own."""

    def __init__(self, scheduler: Any, due: Callable[[], int]) -> None:
        self._scheduler, self._due = scheduler, due

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take the steps that are due. A scheduler that is told a figure, such as ``ReduceLROnPlateau``, is stepped once."""
        if args or kwargs:
            self._scheduler.step(*args, **kwargs)
        else:
            bring(self._scheduler, self._due())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)


class Count:
    """How many steps a plain script's scheduler would have taken by now.

    Within a pass: one for each step up to the minibatch that this worker is at. After a pass: one for each pass that is over. In a
    script without passes: one for each worker.
    """

    def __init__(self, scheduler: Any, passes: Passes) -> None:
        self.scheduler, self.passes, self.taken = scheduler, passes, passes.taken
        self.each = Counter[int]()  # minibatches from one call to the next: several where gradients are accumulated

    def __call__(self) -> int:
        passes = self.passes
        more, self.taken = passes.taken - self.taken, passes.taken
        if passes.running:
            # what most calls have: a script may read ahead of the first ones, and the last one of a pass may have fewer
            self.each[max(more, 1)] += 1
            return passes.position // max(self.each, key=lambda n: (self.each[n], n))
        return passes.over or int(self.scheduler.last_epoch) + passes.replica.workers
