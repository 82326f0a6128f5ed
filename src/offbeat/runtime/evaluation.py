"""A server evaluates the model of a task beside the training, and goes on where it cannot."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.problem import Problem
    from .host import Host


class Evaluator:
    """Evaluates the model of a run as often as asked, evenly over its minibatches, and at its end.

    An evaluation has a thread of its own, so that it stops neither snapshots nor signals, and there is one at a time: one that is
    due meanwhile comes when it is over. What goes wrong (the task's data are not on this machine, its name is not known) is
    said once, and no other evaluation is tried.
    """

    def __init__(self, host: Host, evaluations: int) -> None:
        """``evaluations`` in a run whose number of minibatches is known; else there is one, at the end."""
        total = host.terms.gradients
        self.host, self.whole = host, host.terms.shard == (0, 1)
        self.every = max(1, total // evaluations) if total and evaluations else 0
        self.due = self.every
        self.failed = False
        self._problem: Problem | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an evaluation is going on."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Begin an evaluation if it is time to."""
        done = self.host.leases.done
        if self.every and done >= self.due and not self.busy:
            self.due = (done // self.every + 1) * self.every
            self.begin()

    def begin(self) -> None:
        """Begin an evaluation, where there is a task, and the whole model is here."""
        if self.host.problem and self.whole and not self.failed:
            self._thread = self.host.spawn("an evaluation", self._evaluate)

    def _evaluate(self) -> None:
        try:
            self._problem = self._problem or self.host.parse(self.host.problem)
            self.host.evaluate(self._problem)
        except Exception as error:  # whatever a task may raise
            self.failed = True
            self.host.log.warning(
                f"the model is not evaluated: {self.host.problem[:200]} cannot be here ({str(error) or repr(error)}); "
                "training goes on"
            )
