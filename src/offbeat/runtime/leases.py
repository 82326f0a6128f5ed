"""Which minibatches a run hands out, and which come back."""

from __future__ import annotations


class Tickets:
    """Numbers of minibatches, each handed out once; those of a worker that died come back."""

    def __init__(self, total: int | None) -> None:
        self.total, self.next, self.done = total, 0, 0
        self.returned: list[int] = []

    def take(self, count: int) -> list[int]:
        """Up to ``count`` numbers; none where all are handed out.

        Returned ones go first, and the lowest of them: one that is beyond a script's last pass, which came back when a
        worker left, must not hide one that is still to be done.
        """
        self.returned.sort()
        taken, self.returned = self.returned[:count], self.returned[count:]
        while len(taken) < count and (self.total is None or self.next < self.total):
            taken.append(self.next)
            self.next += 1
        return taken
