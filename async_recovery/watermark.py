"""Which items are finished, and how far the unbroken run of them reaches.

The rule that everything else rests on, with no await, clock or file in it:

* ``mark`` is half-open: every index below it is finished, the index at it is not. It starts at 0.
* ``frontier`` is the next index to hand out. ``durable <= mark <= frontier`` always.
* An index is *ahead* when it is finished and not below the mark. Its value waits until the mark passes it, so
  that values leave in the order of the items.
* An index in ``mark <= index < frontier`` that is not ahead is in flight. That is derived, never stored.
* A step that is not allowed raises, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Watermark(Generic[T]):
    """Hands out indices and takes their completions in any order.

    :param window: how far the frontier may run before the durable mark, in items (1 or more).
    :param mark: the index of the first item that is not known to be finished.
    :param ahead: items at or above `mark` that are finished already, with their values: they are not handed
        out again, and the mark passes them when the frontier has.
    :raises ValueError: if `window` is below 1, `mark` below 0, or an index in `ahead` below `mark`.
    """

    __slots__ = ("_limit", "_unreached", "ahead", "durable", "frontier", "mark", "released", "window")

    def __init__(self, window: int, mark: int = 0, ahead: Mapping[int, T] | None = None) -> None:
        if window < 1:
            raise ValueError(f"the window is {window}: it must be 1 item or more")
        if mark < 0:
            raise ValueError(f"the mark is {mark}: it must be 0 or more")
        self.ahead: dict[int, T] = dict(ahead or {})
        if self.ahead and min(self.ahead) < mark:
            raise ValueError(f"index {min(self.ahead)} can not be ahead of the mark {mark}")
        self._unreached = len(self.ahead)  # of those ahead, the ones that the frontier has not passed
        self.window = window
        self.durable = self.mark = self.frontier = mark
        self._limit = mark + window
        self.released: list[T] = []
        """The values that the mark has passed, in order; whoever writes them takes the list away."""

    def take(self, stop: int) -> int | None:
        """Hand out the next index below `stop` that is not finished yet.

        :returns: the index; None if there is none below `stop`, or if the window is full.
        """
        index = self.frontier
        if index in self.ahead:
            index = self._pass_finished(min(stop, self._limit))
        if index < stop and index < self._limit:
            self.frontier = index + 1
            return index
        return None

    def complete(self, index: int, value: T) -> bool:
        """The item at `index` is finished with `value`.

        :returns: whether it is ahead of the mark now.
        :raises ValueError: if that index is not in flight: never handed out, or finished before.
        """
        mark = self.mark
        if index == mark and index < self.frontier:  # one below the frontier is never ahead at the mark
            self.released.append(value)
            self.mark = mark + 1
            if self.ahead:
                self._advance()
            return False
        if mark < index < self.frontier and index not in self.ahead:
            self.ahead[index] = value
            return True
        known = "was finished before" if 0 <= index < mark or index in self.ahead else "was never handed out"
        raise ValueError(f"index {index} {known} (mark {mark}, frontier {self.frontier})")

    def commit(self, mark: int) -> None:
        """Everything below `mark` is durable: the window moves.

        :raises ValueError: if `mark` is below the durable mark, or above the mark.
        """
        if not self.durable <= mark <= self.mark:
            raise ValueError(f"can not commit mark {mark}: durable is {self.durable}, the mark {self.mark}")
        self.durable = mark
        self._limit = mark + self.window

    @property
    def is_full(self) -> bool:
        """Whether the window lets nothing more out before the next commit."""
        return self.frontier >= self._limit

    @property
    def in_flight(self) -> int:
        """How many items are handed out and not finished."""
        return self.frontier - self.mark - (len(self.ahead) - self._unreached)

    def _pass_finished(self, stop: int) -> int:
        while self.frontier < stop and self.frontier in self.ahead:
            self.frontier += 1
            self._unreached -= 1
        self._advance()
        return self.frontier

    def _advance(self) -> None:
        ahead, mark = self.ahead, self.mark
        while mark < self.frontier and mark in ahead:
            self.released.append(ahead.pop(mark))
            mark += 1
        self.mark = mark
