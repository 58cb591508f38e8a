"""An event loop on which nothing ends by itself: an explorer decides which of the pending awaits ends next.

Whatever the program under test waits for outside of itself (a worker, a commit, a read) is a *moment*. When nothing
can run, the loop's selector asks `Choices` which moment ends. Time passes only when that is chosen, or when nothing
else is left. When even time changes nothing, the program hangs for ever: a violation.

Where the order of the callbacks of one round matters, several moments end in the same round (`together`), or one in
the middle of the others' rounds (`haste`).
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from .explorer import Violation

TIME = "!time"
SHOW = "show"
NO_MORE = "no more"
MOST_IDLE_ROUNDS = 12
MOST_BUSY_ROUNDS = 500
WEIGHTS = (0.02, 0.3, 1.0, 1.0, 5.0)
RARE_WEIGHTS = (0.01, 0.05, 0.3)


class Choices:
    """The choices of one schedule: first those that are given, then by dice; without dice the first option.

    A label that begins with ``!`` is something rare: dice choose it seldom. Every other label has a weight of its own,
    drawn once: so there are slow disks, stragglers, and items that overtake all others.

    :ivar made: what was chosen where there was a choice, by number; `counts`: of how many.
    """

    def __init__(self, given: Sequence[int] = (), dice: Random | None = None) -> None:
        self.made: list[int] = []
        self.counts: list[int] = []
        self.dice = dice
        self._given = given
        self._weights: dict[str, float] = {NO_MORE: 1.0}

    def of(self, options: Sequence[str]) -> str:
        """One of the options; a choice of one is none, and not counted."""
        if len(options) == 1:
            return options[0]
        at = len(self.made)
        chosen = 0
        if at < len(self._given):
            chosen = self._given[at]
        elif self.dice is not None:
            (chosen,) = self.dice.choices(range(len(options)), [self._weight(option) for option in options])
        self.made.append(chosen)
        self.counts.append(len(options))
        return options[chosen]

    def chance(self, probability: float) -> bool:
        """Whether something happens, by dice; never without."""
        return probability > 0 and self.dice is not None and self.dice.random() < probability

    def following(self, fixed: int) -> list[int] | None:
        """The next schedule in depth-first order that begins with the same `fixed` choices; None after the last."""
        made, counts = list(self.made), self.counts
        while len(made) > fixed:
            if made[-1] + 1 < counts[len(made) - 1]:
                made[-1] += 1
                return made
            made.pop()
        return None

    def _weight(self, option: str) -> float:
        weight = self._weights.get(option)
        if weight is None:
            assert self.dice is not None
            weight = self._weights[option] = self.dice.choice(RARE_WEIGHTS if option[0] == "!" else WEIGHTS)
        return weight


class _Selector(selectors.BaseSelector):
    """There is nothing to wait for but what the loop's explorer ends."""

    def __init__(self, loop: ScheduledLoop) -> None:
        self._loop = loop

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        raise NotImplementedError

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        raise NotImplementedError

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.poll(timeout)
        return []


class ScheduledLoop(asyncio.SelectorEventLoop):
    """The loop of one process.

    :param choices: decides.

    :ivar actions: what else can happen while nothing can run, by label; each happens once.
    :ivar lapses: how often time may pass although a moment is pending.
    :ivar story: all that happened, in order; a test may add to it.
    :ivar broken: the first violation that was noticed where raising it would have been caught.
    :ivar look: called whenever nothing can run.
    :ivar tasks: all tasks, in the order in which they were created.
    """

    def __init__(self, choices: Choices, *, together: bool = False, haste: float = 0.0) -> None:
        self.now = 0.0
        self.choices = choices
        self.actions: dict[str, Callable[[], object]] = {}
        self.lapses = 0
        self.story: list[str] = []
        self.broken: str | None = None
        self.look: Callable[[], None] = lambda: None
        self.tasks: list[asyncio.Task[Any]] = []
        self._together = together
        self._haste = haste
        self._pending: dict[str, asyncio.Future[str]] = {}
        self._idle_rounds = self._busy_rounds = 0
        super().__init__(_Selector(self))
        self.set_exception_handler(lambda *_: None)  # after a violation, tasks are thrown away

    def time(self) -> float:
        return self.now

    def create_task(self, *args: Any, **options: Any) -> Any:
        task = super().create_task(*args, **options)
        self.tasks.append(task)
        return task

    def _make_self_pipe(self) -> None:
        """No thread ever wakes this loop."""

    def _close_self_pipe(self) -> None:
        pass

    async def moment(self, *labels: str) -> str:
        """Wait until the explorer ends this. Can be cancelled.

        :param labels: the ways in which it can end.
        :returns: the one that was chosen.
        """
        future = self._add(labels)
        try:
            return await future
        finally:
            self._forget(future)

    async def job(self, *labels: str, interruptible: bool = False) -> str:
        """The same for a job that comes to its end whatever happens to the task that waits for it."""
        future = self._add(labels)
        try:
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    if interruptible:
                        raise
        finally:
            self._forget(future)
        return future.result()

    def fail(self, violation: str) -> None:
        """Notice a violation where the program under test would catch it."""
        if self.broken is None:
            self.broken = violation

    def poll(self, timeout: float | None) -> None:
        """The selector's turn.

        :param timeout: seconds to the next timer; 0: something can run already.
        :raises Violation: if one was noticed, or nothing can ever run again.
        """
        if self.broken is not None:
            raise Violation(self.broken)
        if timeout == 0:
            self._busy_rounds += 1
            if self._busy_rounds > MOST_BUSY_ROUNDS:
                raise Violation("livelock: the loop turns, and nothing ends")
            if self.choices.chance(self._haste) and (options := [*self._undecided(), *self.actions]):
                self._end(self.choices.of(options), timeout)
            return
        self._busy_rounds = 0
        self.look()
        if self.broken is not None:
            raise Violation(self.broken)
        self._choose(timeout)

    def _choose(self, timeout: float | None) -> None:
        options = [*self._undecided(), *self.actions]
        if timeout is not None and (self.lapses or not self._pending):
            options.append(TIME)
        if not options or self._idle_rounds > MOST_IDLE_ROUNDS:
            raise Violation("deadlock: nothing is pending, and the run is not done")
        chosen = self.choices.of(options)
        self._end(chosen, timeout)
        while self._together and chosen != TIME and (rest := [*self._undecided(), *self.actions]):
            chosen = self.choices.of([NO_MORE, *rest])
            if chosen == NO_MORE:
                return
            self._end(chosen, timeout)

    def _end(self, label: str, timeout: float | None) -> None:
        self.story.append(label)
        self._idle_rounds = self._idle_rounds + 1 if label in (TIME, SHOW) else 0
        if label == TIME:
            assert timeout is not None
            self.lapses -= self.lapses > 0
            self.now += timeout
        elif label in self.actions:
            self.actions.pop(label)()
        else:
            future = self._pending[label]
            self._forget(future)
            future.set_result(label)

    def _undecided(self) -> list[str]:
        """What can end; a moment that was cancelled, and does not know it yet, can not."""
        return sorted(label for label, future in self._pending.items() if not future.done())

    def _add(self, labels: Sequence[str]) -> asyncio.Future[str]:
        future: asyncio.Future[str] = self.create_future()
        for label in labels:
            while label in self._pending:
                label += "'"
            self._pending[label] = future
        return future

    def _forget(self, future: asyncio.Future[str]) -> None:
        for label in [label for label, pending in self._pending.items() if pending is future]:
            del self._pending[label]


def running() -> ScheduledLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ScheduledLoop)
    return loop
