"""Who takes part in which round: the same answer to all who ask, while peers come and go."""

from __future__ import annotations

from .topology import Members


class Views:
    """Members of each round, where peers go in rounds; else those who are there now.

    A change counts from a given round on. Whoever makes one takes a round that nobody has asked about yet (`asked` is the
    latest that somebody has), so that an answer once given stays true.
    """

    def __init__(self, rounds: bool, members: Members = (), start: int = 0) -> None:
        """The first ``members``, from round ``start`` on."""
        self.rounds = rounds
        self.asked = start - 1
        self._views: list[tuple[int, Members]] = [(start, members)]  # who is in from which round on

    def at(self, step: int) -> Members:
        """Who takes part in round ``step``, in rising order."""
        if not self.rounds:
            return self._views[-1][1]
        self.asked = max(self.asked, step)
        return next((members for start, members in reversed(self._views) if start <= step), self._views[0][1])

    def same(self, step: int, rounds: int) -> int:
        """Up to which round the members are those of round ``step``: so many ``rounds`` after it at most."""
        return min([step + rounds, *(start for start, _ in self._views if self.rounds and start > step)])

    def change(self, start: int, come: set[int], gone: set[int]) -> None:
        """From round ``start`` on these have come and those have gone."""

        def changed(members: Members) -> Members:
            return tuple(sorted(set(members) - gone | come))

        if not self.rounds:
            self._views = [(0, changed(self._views[-1][1]))]
            return
        earlier = [view for view in self._views if view[0] < start]
        at = next((members for begin, members in reversed(self._views) if begin <= start), self._views[0][1])
        later = [(begin, changed(members)) for begin, members in self._views if begin > start]
        self._views = [*earlier, (start, changed(at)), *later]
