"""The workers: each pulls an item, runs it, and hands in its outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from math import inf
from typing import Any

import anyio

from .admission import Admission
from .collector import Collector
from .cursor import Cursor
from .errors import shorten
from .loops import clock_of
from .workers import AsyncWorker

logger = logging.getLogger("async_recovery")

CANCEL_AGAIN_S = 2.5  # a worker that goes on after a cancellation gets a second one, and as long again
TURN_ITEMS = 64  # so many items may follow each other without a turn of the loop

Encode = Callable[[int, Any], bytes]


class Slot:
    """The place of one worker, where attempts have a time limit.

    :ivar deadline: when its attempt is cancelled; infinity while there is none.
    :ivar began: when its attempt began.
    :ivar limited_by: what ends it then, in words that are the same in each run.
    :ivar expired: its attempt has taken too long.
    """

    __slots__ = ("began", "deadline", "expired", "limited_by", "task")

    def __init__(self) -> None:
        self.began = 0.0
        self.deadline = inf
        self.limited_by = ""
        self.expired = False
        self.task: asyncio.Task[None] | None = None


class Pool:
    """The tasks that run the worker.

    Tasks of our own: beginning and ending one costs 5 µs, in a task group of anyio's 22, and no task group can leave a
    task behind that refuses to end.

    :param worker: in its asynchronous form.
    :param admission: hands out attempts.
    :param cursor: whose waiters a commit wakes.
    :param collector: takes the outcomes.
    :param encode: makes a record of an index and a result.
    :param timeout: seconds an attempt may take; None: any time.
    :param has_deadline: whether the whole time of an item is bounded, which `admission` knows.
    :param interruptible: whether an attempt can be cancelled; otherwise it is let end, and its result does not count.
    :param failed: called with index, item, what was raised, and when the attempt began if that is known.
    :param broken: called with a defect of ours.
    :param commit_helps: whether a commit would let more items out.
    :param due: set when a commit is due.

    :ivar ended: no worker runs any more, but those that were left alone.
    :ivar let_go: indices whose worker has ended without an outcome.
    """

    def __init__(
        self,
        worker: AsyncWorker,
        admission: Admission,
        cursor: Cursor,
        collector: Collector,
        encode: Encode,
        *,
        timeout: float | None,
        has_deadline: bool,
        interruptible: bool,
        failed: Callable[[int, Any, BaseException, float | None], None],
        broken: Callable[[BaseException], None],
        commit_helps: Callable[[], bool],
        due: asyncio.Event,
    ) -> None:
        self._worker = worker
        self._admission = admission
        self._cursor = cursor
        self._collector = collector
        self._encode = encode
        self._timeout = (inf, "") if timeout is None else (timeout, f"no result within {timeout:g} s")
        self._has_deadline = has_deadline
        self._interruptible = interruptible
        self._failed = failed
        self._broken = broken
        self._commit_helps = commit_helps
        self._due = due
        self._loop = asyncio.get_running_loop()
        self._now = clock_of(self._loop)
        self._slots: set[Slot] = set()
        self._sweep_at = inf
        self._sweeper: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._scope = anyio.CancelScope()
        self.ended = False
        self.let_go: set[int] = set()

    async def run(self, concurrency: int) -> None:
        """Until there is nothing left to do, or it is cancelled."""
        self._start(concurrency)
        try:
            with self._scope:
                while running := [task for task in self._tasks if not task.done()]:
                    await asyncio.wait(running)
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    await self._cancel_workers()
            finally:
                self.ended = True
                if self._sweeper is not None:
                    self._sweeper.cancel()
                self._due.set()

    def set_concurrency(self, concurrency: int) -> None:
        """So many workers from now on. Those too many leave when their item is done."""
        running = sum(not task.done() for task in self._tasks)
        if running:
            self._start(self._admission.set_concurrency(concurrency, running))

    def drain(self, timeout: float) -> None:
        """Cancel what has not ended in `timeout` seconds."""
        self._scope.deadline = self._loop.time() + timeout

    def cancel(self) -> None:
        """Cancel what is in flight."""
        self._scope.cancel()

    def why_paused(self) -> None:
        """Nothing keeps them from running."""

    def seen(self) -> tuple[()]:
        """No process but ours runs them."""
        return ()

    def _start(self, count: int) -> None:
        self._tasks = {task for task in self._tasks if not task.done()}
        self._tasks |= {asyncio.create_task(self._worker_task()) for _ in range(count)}

    async def _cancel_workers(self) -> None:
        """Cancel what still runs; what does not end even so is named, and left alone: stopping has a bound."""
        if await cancelled(list(self._tasks)):
            return
        watermark, elsewhere = self._collector.watermark, self.let_go.union(self._admission.waiting)
        in_flight = (i for i in range(watermark.mark, watermark.frontier) if i not in watermark.ahead)
        left = [index for index in in_flight if index not in elsewhere]
        logger.error(
            "%d items go on although they were cancelled, and are left alone: %s. Do not catch CancelledError "
            "in the worker, or raise it again",
            len(left),
            shorten(left),
        )

    async def _worker_task(self) -> None:
        """One worker: pulls an item, runs it, hands in its outcome."""
        admission, cursor, collector, worker = self._admission, self._cursor, self._collector, self._worker
        encode, complete, due = self._encode, collector.complete, self._due
        slot = self._new_slot() if self._timeout[0] < inf or self._has_deadline else None
        try:
            while (taken := admission.take() or await admission.wait()) is not None:
                index, item = taken
                if slot is not None:
                    self._begin(slot, index)
                try:
                    record = encode(index, await worker(item))
                    if slot is not None and self._end(slot):
                        raise TimeoutError(slot.limited_by)
                except BaseException as error:
                    if isinstance(error, GeneratorExit) and not _on_a_loop():
                        raise  # the loop is gone, and this task is thrown away
                    if isinstance(error, asyncio.CancelledError) and self._is_cancelled:
                        self.let_go.add(index)
                        raise
                    self._hand_in(slot, index, item, error)
                    continue
                if index in admission.heeded:
                    admission.succeeded(index)
                if complete(index, record) or (cursor.gated and self._commit_helps()):
                    due.set()
                if not collector.fresh % TURN_ITEMS:  # a worker that never awaits must not keep the loop for itself
                    await asyncio.sleep(0)
        except Exception as error:  # a defect of ours: never a short output
            self._broken(error)
        finally:
            if slot is not None:
                self._slots.discard(slot)

    def _hand_in(self, slot: Slot | None, index: int, item: Any, error: BaseException) -> None:
        began = None
        if slot is not None:
            began, expired = slot.began, slot.expired
            self._end(slot)
            if expired and not isinstance(error, KeyboardInterrupt):
                error = TimeoutError(slot.limited_by)
        self._failed(index, item, error, began)

    @property
    def _is_cancelled(self) -> bool:
        """Whether the engine has cancelled the workers; any other cancellation is an item's failure."""
        return self._scope.cancel_called or self.ended

    # Time limits: one sweep over all workers, when the first of them may have expired.

    def _new_slot(self) -> Slot:
        slot = Slot()
        slot.task = asyncio.current_task()
        self._slots.add(slot)
        return slot

    def _begin(self, slot: Slot, index: int) -> None:
        slot.began = now = self._now()
        limit, slot.limited_by = self._timeout
        if self._has_deadline and (bound := self._admission.bound(index, now)) < limit:
            limit, slot.limited_by = bound, "the whole time that an item may take is over"
        slot.deadline = deadline = now + limit
        if deadline < self._sweep_at:
            self._sweep_next(deadline)

    def _end(self, slot: Slot) -> bool:
        """Whether an attempt that ended by itself has expired in a way that its result does not count."""
        if not self._interruptible and self._now() > slot.deadline:
            slot.expired = True  # it returned before the sweep had its turn
        slot.deadline = inf
        expired, slot.expired = slot.expired, False
        if expired and self._interruptible:
            assert slot.task is not None
            while slot.task.cancelling():
                slot.task.uncancel()
        return expired and not self._interruptible

    def _sweep_next(self, at: float) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_at = at
        self._sweeper = self._loop.call_at(at, self._sweep)

    def _sweep(self) -> None:
        now, earliest = self._now(), inf
        for slot in self._slots:
            if slot.deadline <= now:
                slot.expired = True
                slot.deadline = inf
                if self._interruptible:
                    assert slot.task is not None
                    slot.task.cancel()
                    slot.deadline = now + CANCEL_AGAIN_S
            earliest = min(earliest, slot.deadline)
        self._sweeper, self._sweep_at = None, inf
        if earliest < inf:
            self._sweep_next(earliest)


async def cancelled(tasks: list[asyncio.Task[None]]) -> bool:
    """Cancel what still runs, once more if it goes on, and wait for its end; whether all has ended in that time."""
    for _ in range(2):
        running = [task for task in tasks if not task.done()]
        if not running:
            return True
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    return all(task.done() for task in tasks)


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
