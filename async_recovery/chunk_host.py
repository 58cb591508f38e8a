"""What runs in a process of a cluster: one event loop in a thread of its own, and on it the pool of each run.

The pool is the very one that runs items in the process of a run; its cursor, admission and collector are an `_Inbox`
here, which decides nothing: what fails is told, and comes again if the run wants it.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import carried
from .errors import SlowDown
from .executors import SIGN_OF_LIFE_S, Assignment, Chunk, Failed, Recall, Share, Stop, Told
from .loops import clock_of
from .pool import Pool
from .records import encode_record
from .workers import SessionWorker, as_async, is_async, load

FLUSH_AFTER_S = 0.01
FLUSH_ITEMS, FLUSH_BYTES = 500, 1 << 20
ENDS_WITHIN_S = 6.0
FOR_GOOD = 1 << 62

_INDEX: ContextVar[int] = ContextVar("index")  # of the attempt under way, also in its thread

Tell = Callable[[bytes], None]


class Host:
    """Works for one run in this process. Everything is called on the loop of `background`.

    :param assignment: what the run wants.
    :param tell: sends a pickled `Told` to the run; from any thread.
    :param is_wanted: asked now and then; a process that is leaving its cluster has nobody to work for.
    """

    def __init__(self, assignment: Assignment, tell: Tell, is_wanted: Callable[[], bool] = lambda: True) -> None:
        self.assignment = assignment
        self._tell = tell
        self._is_wanted = is_wanted
        self._inbox: _Inbox
        self._pool: Pool
        self._session: Any = None
        self._running: asyncio.Task[None] | None = None
        self._life: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Load the worker, and wait for items.

        :raises UsageError: if there is no such worker here.
        """
        given = self.assignment.worker
        worker = load(given) if isinstance(given, str) else given
        if isinstance(worker, SessionWorker):
            self._session = worker = worker.begin()
        self._inbox = _Inbox(self._tell, self.assignment.lease_s)
        self._worker, self._interruptible = worker, is_async(worker)
        self._start(1)
        self._live()

    def hear(self, message: bytes) -> None:
        """A pickled message of the run."""
        told = pickle.loads(message)
        self._inbox.heard()
        if isinstance(told, Chunk):
            self._set_share(told.share)
            self._inbox.add(told)
        elif isinstance(told, Share):
            self._set_share(told.share)
        elif isinstance(told, Recall):
            self._inbox.recalled, self._inbox.is_held = True, False
            self._inbox.give_back()
        elif isinstance(told, Stop) and self._stopping is None:
            self._stopping = asyncio.ensure_future(self.stop(for_good=told.for_good))

    async def stop(self, *, for_good: bool) -> None:
        """Cancel what runs, tell of all that has ended, and if it is not for good, be there for more."""
        self._inbox.give_back()
        self._pool.cancel()
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=ENDS_WITHIN_S)
        if for_good and self._life is not None:
            self._life.cancel()
            self._life = None
        if for_good and self._session is not None:
            session, self._session = self._session, None
            await session.aclose()
        self._inbox.cancelled += self._pool.let_go
        self._inbox.running = 0
        self._inbox.stopped, self._inbox.is_held = True, False
        self._inbox.flush()
        self._stopping = None
        if not for_good:
            self._start(1)

    @property
    def ended(self) -> bool:
        """Whether nothing of the run is left here."""
        return self._running is None or self._running.done()

    def _start(self, share: int) -> None:
        inbox: Any = self._inbox
        self._pool = Pool(
            as_async(self._worker, inbox.begun_in_thread),
            inbox,
            inbox,
            inbox,
            encode_record if self.assignment.keeps_records else _no_record,
            timeout=self.assignment.timeout,
            has_deadline=self.assignment.has_deadline,
            interruptible=self._interruptible,
            failed=inbox.failed,
            broken=inbox.broken,
            commit_helps=bool,
            due=asyncio.Event(),
        )
        inbox.begins_when_taken = self._interruptible
        inbox.workers = share
        self._running = asyncio.ensure_future(self._pool.run(share))

    def _set_share(self, share: int) -> None:
        self._inbox.shares += 1
        if self._inbox.share != share:
            self._inbox.set_share(share)
        if self._inbox.workers != max(1, share) and self._stopping is None:
            self._pool.set_concurrency(max(1, share))

    def _live(self) -> None:
        """A sign of life: it comes from the loop on which the items run, and so not while one of them blocks it."""
        if not self._is_wanted():
            self._life = None
            if self._stopping is None:
                self._stopping = asyncio.ensure_future(self.stop(for_good=True))
            return
        self._inbox.turns()
        self._inbox.flush()
        self._life = asyncio.get_running_loop().call_later(SIGN_OF_LIFE_S, self._live)


class _Inbox:
    """What has come, what runs, and what is to be told: cursor, admission and collector of the pool of a `Host`.

    :ivar workers: how many tasks the pool has: one at least, which waits while the share is 0.
    :ivar running: attempts under way.
    :ivar is_held: this process stood still, and what waits here may have been given to another: nothing begins before
        the run has said so.
    :ivar fresh: items finished since the last turn; the pool asks for it.
    :ivar begins_when_taken: an attempt has begun when it is taken; otherwise its thread says so.
    """

    heeded = ()
    gated = 0
    waiting = ()

    def __init__(self, tell: Tell, lease_s: float) -> None:
        self._tell = tell
        self._still_s = max(lease_s - 2 * SIGN_OF_LIFE_S, 2 * SIGN_OF_LIFE_S)
        self._is_rated = False
        self._loop = asyncio.get_running_loop()
        self._now = clock_of(self._loop)
        self._turned_at = self._heard_at = self._now()
        self._queue: deque[tuple[int, Any]] = deque()
        self._bounds: dict[int, float] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._excess = 0
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._records: list[tuple[int, bytes]] = []
        self._failures: list[Failed] = []
        self._returned: list[int] = []
        self._begun: list[int] = []
        self.workers = self.share = self.shares = self.running = 0
        self.fresh = 0
        self.cancelled: list[int] = []
        self.recalled = self.stopped = self.is_held = self._stood_still = False
        self.begins_when_taken = False
        self.watermark = self
        self.ahead: dict[int, bytes] = {}
        self.mark = self.frontier = 0

    def add(self, chunk: Chunk) -> None:
        """Items to run, in their order."""
        self._is_rated = chunk.is_rated
        self._bounds.update(zip(chunk.indices, chunk.bounds, strict=bool(chunk.bounds)))
        for index, data in zip(chunk.indices, chunk.items, strict=True):
            try:
                self._queue.append((index, pickle.loads(data)))
            except Exception as error:  # of a type that is not here
                self._failures.append(Failed(index, carried.pack(error), None))
                self.soon()
        if self.is_held:
            self.give_back()
        else:
            self._wake(len(chunk.items))

    def turns(self) -> None:
        """The loop turns; if it has not for about a lease, or nothing was heard for so long, nothing begins for now."""
        now = self._now()
        if max(now - self._turned_at, now - self._heard_at) > self._still_s and not self.is_held:
            self.is_held = self._stood_still = True
            self.give_back()
        self._turned_at = now

    def heard(self) -> None:
        """The run has said something."""
        self.turns()
        self._heard_at = self._now()

    def set_share(self, share: int) -> None:
        """So many at once from now on; with a share of 0 nothing begins, and what waits goes back."""
        self.share = share
        if not share:
            self.give_back()
        self.soon()

    def give_back(self) -> None:
        """What has not begun does not begin here."""
        self._returned += [index for index, _ in self._queue]
        for index, _ in self._queue:
            self._bounds.pop(index, None)
        self._queue.clear()
        self.soon()

    # As the pool sees them: the admission

    def take(self) -> tuple[int, Any] | None:
        """The next item that has come."""
        self.turns()
        if not self._queue or self._excess or not self.share:
            return None
        self.running += 1
        taken = self._queue.popleft()
        if self._is_rated:
            _INDEX.set(taken[0])
            if self.begins_when_taken:
                self._begins(taken[0])
        return taken

    async def wait(self) -> tuple[int, Any] | None:
        """As `take`, but waits; None for a task that is needed no longer."""
        while (taken := self.take()) is None:
            if self._excess:
                self._excess -= 1
                return None
            future = self._loop.create_future()
            self._waiting.append(future)
            await future
        return taken

    def bound(self, index: int, now: float) -> float:
        """Seconds that the attempt may take by the deadline of its item."""
        return self._bounds.pop(index, float("inf"))

    def set_concurrency(self, concurrency: int, running: int) -> int:
        """How many tasks are to be started."""
        self.workers = concurrency
        self._excess = max(0, running - concurrency)
        if self._excess:
            self._wake(len(self._waiting))
        return max(0, concurrency - running)

    def begun_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        """An attempt has begun, in the thread that calls this."""
        if self._is_rated:
            loop.call_soon_threadsafe(self._begins, _INDEX.get(None))

    def _begins(self, index: int | None) -> None:
        if index is not None:  # it was taken while there was no limit
            self._begun.append(index)
            self.soon()

    # The collector

    def complete(self, index: int, record: bytes) -> bool:
        """An item has a result."""
        self._records.append((index, record))
        self.running -= 1
        self.fresh += 1
        self._bytes += len(record)
        if len(self._records) >= FLUSH_ITEMS or self._bytes >= FLUSH_BYTES:
            self.flush()
        elif self._timer is None:
            self.soon()
        return False

    def failed(self, index: int, item: Any, error: BaseException, began: float | None) -> None:
        """An attempt failed; one that asks for a pause of all is obeyed here at once."""
        took = None if began is None else self._now() - began
        self._failures.append(Failed(index, carried.pack(error), took))
        self.running -= 1
        self.fresh += 1
        if SlowDown.within(error) is not None:
            self.give_back()
        self.soon()

    def broken(self, error: BaseException) -> None:
        """A defect of ours: this process dies of it, and the run gives what it had to another."""
        raise error

    def flush(self) -> None:
        """Tell all that is to be told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ended = (self._records, self._failures, self._returned, self.cancelled)
        told = Told(
            *ended, self._begun, self.running, self.share, self.shares, self.recalled, self.stopped, self._stood_still
        )
        self._records, self._failures, self._returned, self.cancelled, self._begun = [], [], [], [], []
        self._bytes = 0
        self.recalled = self.stopped = self._stood_still = False
        self._tell(pickle.dumps(told, 5))

    def soon(self) -> None:
        """Tell what there is within moments."""
        if self._timer is None:
            self._timer = self._loop.call_later(0 if self._is_rated else FLUSH_AFTER_S, self.flush)

    def _wake(self, count: int) -> None:
        while count and self._waiting:
            future = self._waiting.popleft()
            if not future.done():  # it is: a task that was cancelled waited there
                future.set_result(None)
                count -= 1


class Background:
    """One event loop in a thread of its own, for all runs that this process works for."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._hosts: dict[str, tuple[Host, str]] = {}
        self._turns: dict[str, int] = {}  # also of runs that have ended here: who asks late begins nothing
        self._gone: set[str] = set()  # owners
        self._lock = asyncio.Lock()
        self._thread = threading.Thread(target=self.loop.run_forever, name="async_recovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, once it has ended all that it worked for."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def begin(self, host: Host, owner: str, turn: int = 1) -> None:
        """Let `host` work for `owner`, once whoever worked for the same place has been stopped.

        A process that is slow to answer is asked more than once, and answers in the end to all of it: what works
        for that turn of the run, or for a later one, goes on; what has ended does not begin again.

        :raises UsageError: if its worker can not be loaded here.
        """
        run, place = host.assignment.run, host.assignment.place or object()
        async with self._lock:
            if owner in self._gone or self._turns.get(run, 0) >= turn:
                return
            await self._end_those(lambda other, _: other.assignment.run == run or other.assignment.place == place)
            host.begin()
            self._hosts[run], self._turns[run] = (host, owner), turn

    async def end(self, run: str) -> None:
        """Stop working for that run, if anything does, and for good."""
        async with self._lock:
            self._turns[run] = FOR_GOOD
            await self._end_those(lambda host, _: host.assignment.run == run)

    async def end_of(self, owner: str) -> None:
        """Stop working for somebody who is gone, and will not come back by that name."""
        async with self._lock:
            self._gone.add(owner)
            await self._end_those(lambda _, other: other == owner)

    def hear(self, run: str, message: bytes) -> None:
        """A message of that run."""
        if run in self._hosts:
            self._hosts[run][0].hear(message)

    async def _end_those(self, are_meant: Callable[[Host, str], bool]) -> None:
        meant = [run for run, (host, owner) in self._hosts.items() if are_meant(host, owner)]
        hosts = [self._hosts.pop(run)[0] for run in meant]
        await asyncio.gather(*(host.stop(for_good=True) for host in hosts))


def _no_record(index: int, result: Any) -> bytes:
    return b""
