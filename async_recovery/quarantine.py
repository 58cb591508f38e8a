"""Which item kills the process: after an unclean end, items start only when the journal names them.

An item that was named and not finished when the process died is suspected, once for each such death. Items that were in
flight beside it are suspected too; so one that the next death would give up is started alone: then it is the one.

Plain decisions: no await, clock or file. Whoever asks makes the names durable in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

Taken = tuple[int, Any]


class Quarantine:
    """The items that an earlier process may have begun, on their way to the workers.

    :param limit: indices below it may have been begun.
    :param after: an item is given up after so many deaths.
    :param starts: deaths so far, by index.
    :param group: how many items are named at once.

    :ivar starts: named starts that have not come to an end, by index.
    :ivar given_up: items that were named too often; whoever asks takes them away.
    """

    def __init__(self, limit: int, after: int, starts: dict[int, int], group: int) -> None:
        self.starts = starts
        self.given_up: list[Taken] = []
        self._limit = limit
        self._after = after
        self._group = group
        self._to_name: list[Taken] = []
        self._being_named: list[Taken] = []
        self._named: deque[Taken] = deque()
        self._alone: deque[Taken] = deque()
        self._beyond: Taken | None = None
        self._returned: deque[Taken] = deque()
        self._running: set[int] = set()
        self._solo = False

    @property
    def waiting(self) -> list[int]:
        """The indices that were taken and have not been started."""
        beyond = [] if self._beyond is None else [self._beyond]
        groups = [*self._to_name, *self._being_named, *self._named, *self._alone, *self._returned, *beyond]
        return [index for index, _ in groups]

    @property
    def is_over(self) -> bool:
        """Whether every item below the limit has come to an end."""
        return self._beyond is None and not self._running and not self.waiting and self._limit == 0

    @property
    def holds_all(self) -> bool:
        """Whether nothing may start beside the one that runs alone."""
        return self._solo and bool(self._running)

    def next(self, take: Callable[[], Taken | None]) -> Taken | None:
        """The next item to start. None: there is none, or names are to be made durable first (see `to_name`).

        :param take: gives the next item that was not started in this run.
        """
        if self._named:
            started = self._named.popleft()
            self._running.add(started[0])
            return started
        if self._to_name or self._being_named or self.holds_all:
            return None
        self._gather(take)
        if self._to_name:
            return None
        if self._alone:
            if not self._running:
                self._name([self._alone.popleft()], solo=True)
            return None
        taken, self._beyond = self._beyond, None
        if taken is not None and not self._running:
            self._limit = 0
        return taken

    def _gather(self, take: Callable[[], Taken | None]) -> None:
        group: list[Taken] = []
        while len(group) < self._group:
            taken = self._next_taken(take)
            if taken is None:
                break
            starts = self.starts.get(taken[0], 0)
            if taken[0] >= self._limit:
                self._beyond = taken
            elif starts >= self._after:
                self.given_up.append(taken)
            elif starts == self._after - 1:
                self._alone.append(taken)
            else:
                group.append(taken)
        if group:
            self._name(group, solo=False)

    def _next_taken(self, take: Callable[[], Taken | None]) -> Taken | None:
        if self._returned:
            return self._returned.popleft()
        return take() if self._beyond is None else None

    def _name(self, group: list[Taken], *, solo: bool) -> None:
        self._to_name, self._solo = group, solo
        for index, _ in group:
            self.starts[index] = self.starts.get(index, 0) + 1

    @property
    def to_name(self) -> list[int]:
        """The indices that the next commit is to name."""
        return [index for index, _ in self._to_name]

    def naming(self) -> None:
        """A commit that names them is under way."""
        self._being_named += self._to_name
        self._to_name = []

    def named(self) -> None:
        """That commit is durable."""
        self._named.extend(self._being_named)
        self._being_named.clear()

    def ended(self, index: int) -> bool:
        """An attempt of the item at `index` has ended, one way or the other: it is not suspected for this start.

        :returns: whether its `starts` have changed.
        """
        if index not in self._running:
            return False
        self._running.discard(index)
        self.starts[index] -= 1
        return True

    def give_back(self, taken: Taken) -> bool:
        """An item is to be tried again.

        :returns: whether it is one that has to be named once more.
        """
        if taken[0] >= self._limit:
            return False
        self._returned.append(taken)
        return True

    def refund(self) -> list[int]:
        """The process ends in order: what was named and did not end is not suspected for that.

        :returns: the indices whose `starts` have changed.
        """
        named = [*self._to_name, *self._being_named, *self._named]
        unfinished = sorted(self._running.union(index for index, _ in named))
        for index in unfinished:
            self.starts[index] -= 1
        self._running.clear()
        self._named.clear()
        self._to_name, self._being_named = [], []
        return unfinished
