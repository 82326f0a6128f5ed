"""Schedulers of the learning rate that go by where the run is, not by this worker's own steps.

A plain script's scheduler counts its steps: ``OneCycleLR(optimizer, total_steps=epochs * len(loader))``. Of N workers each takes about an
N-th of the minibatches, so its own count would end at an N-th of the way; and a worker that is started again would begin anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .passes import Passes


class RunScheduler:
    """A scheduler of torch whose ``step()`` brings it to where the run is. All else is the scheduler's own."""

    def __init__(self, scheduler: Any, passes: Passes) -> None:
        self._scheduler, self._passes = scheduler, passes
        self._taken = passes.taken
        self._each = 0  # minibatches of one step: several where gradients are accumulated

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Within a pass: one step for each that a plain script would have taken up to the minibatch that this worker is at. After
        a pass: one for each pass that is over. In a script without passes: one for each worker. A scheduler that is told a figure, such as ``ReduceLROnPlateau``, is stepped once.
        """
        if args or kwargs:
            self._scheduler.step(*args, **kwargs)
            return
        passes = self._passes
        if passes.running:
            self._each = max(self._each, passes.taken - self._taken, 1)
            due = passes.position // self._each
        elif passes.over:
            due = passes.over
        else:  # a loop of the script's own
            due = self._scheduler.last_epoch + passes.replica.workers
        self._taken = passes.taken
        while self._scheduler.last_epoch < due:
            self._scheduler.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)
