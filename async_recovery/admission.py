"""What may begin now: an item that is to be tried again, the next one of the cursor, or nothing for a while.

While nothing is out of the ordinary, `take` is the cursor's own, and costs nothing more. Items that wait for their next
attempt hold no worker and change nothing until a timer finds one of them due.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Callable, Container
from math import inf
from typing import Any

from .checkpoint import Spent
from .cursor import Cursor
from .errors import Quarantined, SlowDown, describe, shorten
from .loops import clock_of
from .policies import Breaker, Gate, RateLimit, Retry, come_back_after
from .quarantine import Quarantine

logger = logging.getLogger("async_recovery")

Taken = tuple[int, Any]
EVERY_INDEX = range(1 << 62)
FailedForGood = Callable[[int, Any, BaseException], None]


class Admission:
    """Hands out attempts.

    :param cursor: gives the items that have not been tried yet in this run.
    :param concurrency: how many workers there are.
    :param spent: what earlier runs spent on items that are not finished, by index.
    :param resumed: an earlier run may have begun attempts just now.
    :param settled_by_worker: whoever runs the worker calls `settle` when an attempt has really begun.
    :param suspects_below: an earlier process died, and may have begun items below this index; 0: none did.
    :param give_up: called for an item that has failed without an attempt: its deadline has passed while it waited, or
        the process died too often while it ran.
    :param commit: called when something is to be committed before more may begin.
    :param dice: gives 0 to 1.

    :ivar take: the next index and its item; None if nothing may begin at this moment.
    :ivar spent: failed attempts of each item that is not finished, by index. 0 is written over an earlier number, and
        stands for one that failed in an outage.
    :ivar changed: the indices whose `spent` has changed since the last commit.
    :ivar heeded: the items whose success `succeeded` is to be told of; nearly always few.
    :ivar retries: failed attempts of this run that are followed by another one.
    """

    def __init__(
        self,
        cursor: Cursor,
        concurrency: int,
        *,
        retry: Retry | None,
        rate_limit: RateLimit | None,
        spent: dict[int, Spent],
        resumed: bool,
        suspects_below: int,
        give_up: FailedForGood,
        commit: Callable[[], None],
        settled_by_worker: bool,
        dice: Callable[[], float],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = clock_of(self._loop)
        now = self._now()
        self._cursor = cursor
        self._concurrency = concurrency
        self._retry = retry
        self._gate = None if rate_limit is None else Gate(rate_limit, now, spent=resumed)
        self._breaker = Breaker(retry) if retry is not None else None
        self._give_up = give_up
        self._settled_by_worker = settled_by_worker
        self._dice = dice
        self._again: list[tuple[float, int, Any, BaseException]] = []
        self._due: deque[tuple[int, Any, BaseException]] = deque()
        self._due_timer: asyncio.TimerHandle | None = None
        self._due_at = inf  # uvloop's handles do not tell
        self._since: dict[int, float] = {}  # when the first attempt of an item that has failed began, less all pauses
        self._probe: Taken | None = None
        self._paused_at = self._paused_until = self._pause_s = 0.0
        self._left_to_come_back, self._next_comes_back = 0, 0.0
        self._paused_by_hand: float | None = None
        self._excess = 0
        self._held_back = False  # workers wait although there may be something for them
        self._outage_began = 0.0
        self._paused_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = inf
        self._commit = commit
        self._quarantine: Quarantine | None = None
        after = None if retry is None else retry.quarantine_after
        if after is not None and suspects_below:
            starts = {index: item.starts for index, item in spent.items() if item.starts}
            self._quarantine = Quarantine(suspects_below, after, starts, concurrency)
        self.spent = {index: item.attempts for index, item in spent.items() if item.attempts}
        self.changed: set[int] = set()
        self.retries = 0
        is_outage = self._breaker is not None and self._breaker.expect(len(self.spent), now)
        self.heeded = self._heeded()
        if is_outage:
            self._outage_began = now
            logger.warning(
                "%d items have failed attempts from an earlier run, as many as an outage leaves: single items are "
                "tried first",
                len(self.spent),
            )
        self.take: Callable[[], Taken | None] = cursor.take if self._is_ordinary else self._take

    async def wait(self) -> Taken | None:
        """As `take`, but waits; None when the worker that asks is needed no longer."""
        while (taken := self.take()) is None:
            if self._excess:
                self._excess -= 1
                return None
            if self.finished:
                return None
            await self._cursor.changed()
        return taken

    @property
    def finished(self) -> bool:
        """Nothing will be handed out any more, unless an attempt that runs now fails."""
        if self._cursor.stopped:
            return True
        suspects = self._quarantine is not None and bool(self._quarantine.waiting)
        return self._cursor.finished and not (self._again or self._due or self._probe or suspects)

    @property
    def waiting(self) -> list[int]:
        """The indices that are handed out, but not being tried: they wait for their next attempt."""
        probe = [] if self._probe is None else [self._probe[0]]
        if self._quarantine is not None:
            probe += self._quarantine.waiting
        return [*probe, *(index for index, _, _ in self._due), *(index for _, index, _, _ in self._again)]

    def why_paused(self, now: float) -> str | None:
        """Why nothing begins, for people; None if that is not so."""
        if self._paused_by_hand is not None:
            return "paused by the caller"
        if now < self._paused_until:
            return f"the worker asked for a pause, {self._paused_until - now:.0f} s left"
        if self._breaker is not None and self._breaker.open:
            return "an outage: one item after the other is tried to see whether it is over"
        return None

    def clock(self, now: float) -> float:
        """The time that counts for the deadlines of items: it stands still while the run pauses."""
        paused = self._paused_s + min(now, self._paused_until) - self._paused_at
        if self._paused_by_hand is not None:
            paused += now - self._paused_by_hand
        if self._breaker is not None and self._breaker.open:
            paused += now - self._outage_began
        return now - paused

    def bound(self, index: int, now: float) -> float:
        """Seconds that the attempt which begins now may take, by the deadline of its item."""
        assert self._retry is not None
        assert self._retry.deadline is not None
        clock = self.clock(now)
        return self._since.get(index, clock) + self._retry.deadline - clock

    def forget(self, index: int) -> None:
        """The item at `index` is finished, one way or the other."""
        self._end_attempt(index)
        self.spent.pop(index, None)
        self.changed.discard(index)
        self._since.pop(index, None)

    def succeeded(self, index: int) -> None:
        """The item at `index` is finished, with a result."""
        self.forget(index)
        breaker = self._breaker
        if breaker is not None and not breaker.calm and breaker.succeeded(index):
            self._paused_s += self._now() - self._outage_began
            logger.warning("the outage is over: item %d succeeded, all workers go on", index)
            self._cursor.wake()
        self.heeded = self._heeded()

    def _heeded(self) -> Container[int]:
        """After a failure the next success of any item counts; otherwise that of an item which has failed."""
        is_calm = self._quarantine is None and (self._breaker is None or self._breaker.calm)
        return self.spent if is_calm else EVERY_INDEX

    def take_spent(self) -> list[Spent]:
        """What the next commit is to remember: failed attempts of items that are not finished, where that is new."""
        changed, self.changed = self.changed, set()
        starts = {} if self._quarantine is None else self._quarantine.starts
        if self._quarantine is not None:
            self._quarantine.naming()
        return [Spent(index, self.spent.get(index, 0), starts.get(index, 0)) for index in sorted(changed)]

    def committed(self) -> None:
        """What `take_spent` gave is durable."""
        if self._quarantine is not None:
            self._quarantine.named()

    def end_in_order(self) -> None:
        """The next commit is the last one, and nothing runs any more."""
        if self._quarantine is not None:
            self.changed.update(self._quarantine.refund())

    def slow_down(self, index: int, item: Any, error: SlowDown) -> None:
        """The worker asked for a pause of all: its item comes again, with no attempt spent."""
        now = self._now()
        until = now + error.seconds
        if until > self._paused_until:
            if now >= self._paused_until:
                self._paused_s += self._paused_until - self._paused_at
                self._paused_at = now
                level = logging.WARNING if error.seconds else logging.DEBUG
                logger.log(
                    level, "all workers pause for %g s: item %d (%s) asked for it", error.seconds, index, shorten(item)
                )
            self._paused_until, self._pause_s = until, error.seconds
            self._left_to_come_back, self._next_comes_back = self._concurrency, until
            self.take = self._take
        if self._breaker is not None:
            self._breaker.give_back(index, until)
        self._end_attempt(index)
        self._try_again(until, index, item, error)

    @property
    def is_ordinary(self) -> bool:
        """Whether any number may be handed out before the first of them begins."""
        return self._is_ordinary and self._paused_until <= self._now()

    def give_back(self, index: int, item: Any) -> None:
        """What was handed out has not begun, or ended with the process that it ran in: it comes again, at no cost."""
        if self._breaker is not None:
            self._breaker.give_back(index, self._now())
        self._end_attempt(index)
        self._due.append((index, item, TimeoutError("the whole time that an item may take is over")))
        self.take = self._take
        self._cursor.wake(1)

    def begin_again(self, index: int) -> bool:
        """Whether an item that was handed out before, and not given back, may begin now; then it counts as begun.

        Not even an outage holds it back: what probes for its end may have no other place to run.
        """
        now = self._now()
        if self._cursor.stopped or self._opens_at(now) > now:
            return False
        self._begins(index, now)
        return True

    def failed(self, index: int, item: Any, error: BaseException, began: float | None) -> bool:
        """An attempt failed.

        :param began: when it began; None if nobody asked for that.
        :returns: whether the item is tried again; otherwise it has failed for good.
        """
        retry, breaker, now = self._retry, self._breaker, self._now()
        if retry is None or breaker is None:
            return False
        self._end_attempt(index)
        clock, dice = self.clock(now), self._dice()
        since = self._since.setdefault(index, clock if began is None else clock - (now - began))
        if isinstance(error, asyncio.CancelledError):
            error = Exception("the worker raised CancelledError")  # which is no Exception by type
        is_worth_it = retry.applies_to(error)
        if is_worth_it and self._is_outage():
            breaker.failed(index, now)
            self.spent.setdefault(index, 0)
            self._try_again(now + retry.delay(1, dice), index, item, error)
            return True
        if not is_worth_it:
            breaker.give_back(index, now)  # should it be a probe: that failure is its own, and no answer
        spent = self.spent.get(index, 0) + 1
        delay = retry.next_attempt(spent, clock - since, dice) if is_worth_it else None
        self.spent[index] = 0 if delay is None else spent  # a run that stops here gives it all its attempts again
        self.changed.add(index)
        self.heeded = EVERY_INDEX
        if delay is not None:
            self._try_again(now + delay, index, item, error)
        is_news = is_worth_it and spent == 1  # that an item fails once more tells nothing of the others
        if is_news and not breaker.open and breaker.failed(index, now):
            self._outage_began = now
            self.take = self._take
            logger.warning(
                "%d failed attempts in a row, the last one with %s: the run pauses, and tries single items until one "
                "succeeds",
                retry.breaker,
                describe(error),
            )
        return delay is not None

    def pause(self) -> None:
        """Begin nothing until `unpause`."""
        if self._paused_by_hand is None:
            self._paused_by_hand = self._now()
            self.take = self._take

    def unpause(self) -> None:
        """Go on after `pause`."""
        if self._paused_by_hand is not None:
            self._paused_s += self._now() - self._paused_by_hand
            self._paused_by_hand = None
            self._cursor.wake()

    def set_concurrency(self, concurrency: int, running: int) -> int:
        """There shall be `concurrency` workers, `running` are there.

        :returns: how many are to be started. Those too many leave when their item is done.
        """
        self._concurrency = concurrency
        missing = concurrency - running
        self._excess = max(0, -missing)
        if self._excess:
            self.take = self._take
            self._cursor.wake()
        return max(0, missing)

    def set_rate(self, limit: RateLimit | None) -> None:
        """So many attempts a second from now on; None: as many as there can be.

        What began in the last second counts for the new limit, too. Without an old one nobody has counted that: then it
        may have been as many as the new one allows.
        """
        old, now = self._gate, self._now()
        self._gate = None if limit is None else Gate(limit, now, spent=True, after=old)
        self.take = self._take  # which finds out by itself when all is ordinary again
        self._cursor.wake()

    @property
    def is_rated(self) -> bool:
        """Whether `settle` is to be called for what is handed out now."""
        return self._gate is not None

    def settle_from_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        """As `settle`, from the thread in which the attempt begins."""
        if self._gate is not None:
            loop.call_soon_threadsafe(self.settle)

    def settle(self) -> None:
        """An attempt that was handed out has surely begun by now."""
        if self._gate is None:
            return
        now = self._now()
        self._gate.settle(now)
        if self._cursor.waited_for:
            self._wake_at(self._opens_at(now))

    # Out of the ordinary

    def _is_outage(self) -> bool:
        """Whether the breaker is open and an item that has not failed yet is there to probe with. It is kept."""
        if self._breaker is None or not self._breaker.open or self._quarantine is not None:
            return False
        while self._probe is None and (taken := self._cursor.take()) is not None:
            if taken[0] in self.spent:  # it failed in an earlier run
                self._due.append((*taken, TimeoutError("the whole time that an item may take is over")))
            else:
                self._probe = taken
        return self._probe is not None

    def _try_again(self, due: float, index: int, item: Any, error: BaseException) -> None:
        self.retries += not isinstance(error, SlowDown)
        heapq.heappush(self._again, (due, index, item, error))
        self._await_due()

    def _await_due(self) -> None:
        due = self._again[0][0]
        if due < self._due_at:
            if self._due_timer is not None:
                self._due_timer.cancel()
            self._due_at, self._due_timer = due, self._loop.call_at(due, self._move_due)

    def _move_due(self) -> None:
        self._due_at = inf
        now = self._now()
        while self._again and self._again[0][0] <= now:
            self._due.append(heapq.heappop(self._again)[1:])
        if self._again:
            self._await_due()
        if self._due:
            self.take = self._take
            self._cursor.wake(len(self._due))

    def _take(self) -> Taken | None:
        now = self._now()
        opens_at = self._opens_at(now)
        if opens_at > now or self._excess or self._cursor.stopped:
            self._wake_at(opens_at)
            self._held_back = True
            return None
        taken = self._choose(now)
        if taken is None:
            self._held_back = self._held_back or not self._is_ordinary
            return None
        self._begins(taken[0], now)
        if self.finished:
            self._cursor.wake()
        elif self._cursor.waited_for and not self._is_ordinary:
            self._wake_at(max(now, self._opens_at(now)))  # another worker may wait for the next one
        return taken

    def _begins(self, index: int, now: float) -> None:
        if self._breaker is not None and self._breaker.open:
            self._breaker.begins(index)
        if self._gate is not None:
            self._gate.begin(now)
            if not self._settled_by_worker:
                self._loop.call_soon(self.settle)
        if self._left_to_come_back:
            self._left_to_come_back -= 1
            self._next_comes_back = now + come_back_after(self._pause_s, self._concurrency, self._dice())

    def _choose(self, now: float) -> Taken | None:
        if self._is_outage():
            assert self._breaker is not None
            at = self._breaker.probes_at()
            if at > now:
                self._wake_at(at)
                return None
            taken, self._probe = self._probe, None
            assert taken is not None
            self._breaker.probe(taken[0])
            return taken
        if self._probe is not None:
            taken, self._probe = self._probe, None
            return taken
        if self._quarantine is not None and self._quarantine.holds_all:
            return None
        while self._due and not self._cursor.stopped:
            index, item, error = self._due.popleft()
            if self._retry is not None and self._retry.deadline is not None and self.bound(index, now) <= 0:
                self._give_up(index, item, error)
            elif self._quarantine is None or not self._quarantine.give_back((index, item)):
                return index, item
        if self._quarantine is not None:
            return self._choose_suspect(self._quarantine)
        if self._is_ordinary:
            self.take = self._cursor.take
            if self._held_back:
                self._held_back = False
                self._cursor.wake()
        return self._cursor.take()

    def _choose_suspect(self, quarantine: Quarantine) -> Taken | None:
        taken = quarantine.next(self._cursor.take)
        given_up, quarantine.given_up = quarantine.given_up, []
        for index, item in given_up:
            self.spent[index] = quarantine.starts[index] = 0  # a run that stops here lets it start again
            self.changed.add(index)
            deaths = self._retry.quarantine_after if self._retry is not None else 0
            self._give_up(index, item, Quarantined(f"deaths of the process while this item ran: {deaths}"))
        if quarantine.to_name:
            self.changed.update(quarantine.to_name)
            self._commit()
        if quarantine.is_over:
            self._quarantine = None
        return taken

    def _end_attempt(self, index: int) -> None:
        if self._quarantine is not None:
            if self._quarantine.ended(index):
                self.changed.add(index)
            self._cursor.wake()

    def _opens_at(self, now: float) -> float:
        """The moment from which on anything may begin; infinity if only another event can tell."""
        if self._paused_by_hand is not None:
            return inf
        at = self._paused_until
        if self._left_to_come_back:
            at = max(at, self._next_comes_back)
        return at if self._gate is None else max(at, self._gate.opens_at(now))

    @property
    def _is_ordinary(self) -> bool:
        return (
            self._gate is None
            and self._quarantine is None
            and not self._due
            and not self._left_to_come_back
            and not self._excess
            and self._paused_by_hand is None
            and (self._breaker is None or not self._breaker.open)
        )

    def _wake_at(self, at: float) -> None:
        """Let one worker look again at that moment."""
        if at < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at, self._timer = at, self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._wakes_at = inf
        self._cursor.wake(1)

    def close(self) -> None:
        """Nothing begins any more."""
        for timer in (self._timer, self._due_timer):
            if timer is not None:
                timer.cancel()
