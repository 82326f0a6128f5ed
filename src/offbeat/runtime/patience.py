"""Processes of a data loader that outlive a signal to the whole job.

A scheduler sends SIGTERM to all processes of a job, and the processes of a `DataLoader` would end at once: the training loop, which is
to finish its step and leave its run, would fail with them. `Patient` lets them go on for the grace period.
"""

from __future__ import annotations

import _thread
import os
import signal
import time
from collections.abc import Callable
from typing import Any


class Patient:
    """A loader's ``worker_init_fn``: SIGTERM ends the process when the parent has left its run, when the parent is gone, or after the
    grace period. It is not ignored for ever, as PyTorch ends processes that are stuck by it.
    """

    def __init__(self, init: Callable[[int], None] | None, over: Any, grace: float) -> None:
        """``init`` is the loader's own function, ``over`` a shared byte that is set when the parent has left, ``grace`` in seconds."""
        self.init, self.over, self.grace = init, over, grace

    def __call__(self, number: int) -> None:
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        self.parent = os.getppid()
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # works while the main thread is inside of other code
        signal.signal(signal.SIGTERM, lambda *_: None)
        _thread.start_new_thread(self._end, (told,))
        if self.init is not None:
            self.init(number)

    def _end(self, told: int) -> None:
        """Wait for the signal, and then for the end."""
        while signal.SIGTERM not in os.read(told, 64):
            pass
        until = time.monotonic() + self.grace
        while time.monotonic() < until and not self.over.value and os.getppid() == self.parent:
            time.sleep(0.02)
        os._exit(0)  # another status would be an error of the loader's
