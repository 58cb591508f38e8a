"""A cluster on the loop of the test: seats that come, go, die and fall silent when the test says so, in virtual time.

The seats are the real ones (`chunk_host`), on the same loop; only the way of the bytes is a timer.
"""

from __future__ import annotations

import asyncio
import contextvars
import pickle
from collections import Counter, deque
from functools import partial
from typing import Any

from async_recovery.chunk_host import Host
from async_recovery.chunk_pool import ChunkPool
from async_recovery.executors import Assignment, Chunk, Listener, Stop, Work, WorkerPool
from async_recovery.workers import Worker

SEAT: contextvars.ContextVar[FakeSeat] = contextvars.ContextVar("seat")


class FakeSeat:
    """One process.

    :ivar is_silent: nothing comes from it, nor reaches it, until `wake`.
    :ivar chunks: how many items each chunk had that reached it.
    :ivar times_held: how often it said that it had stood still, or heard nothing.
    :ivar began: the items that began there, if the worker says so with `note`.
    """

    def __init__(self, cluster: FakeCluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.is_silent = self.is_dead = False
        self.held: list[Any] = []
        self.chunks: list[int] = []
        self.times_held = 0
        self.began: list[Any] = []
        self.running = self.most_running = 0
        self.context = contextvars.copy_context()
        self.context.run(SEAT.set, self)
        self.host: Host

    def begin(self, assignment: Assignment) -> None:
        self.host = Host(assignment, self.tell, lambda: not self.is_dead)
        self.context.run(self.host.begin)

    def tell(self, data: bytes) -> None:
        self.times_held += pickle.loads(data).stood_still
        self._say(data)

    def _say(self, data: bytes) -> None:
        if self.is_silent:
            self.held.append(lambda: self._say(data))
        elif not self.is_dead:
            self.cluster.later(self.cluster.listener.heard, self.name, data, after_s=self.cluster.says_after_s)

    def hear(self, data: bytes) -> None:
        if self.is_silent:
            self.held.append(lambda: self.hear(data))
        elif not self.is_dead:
            message = pickle.loads(data)
            if isinstance(message, Chunk):
                self.chunks.append(len(message.indices))
            self.context.run(self.host.hear, data)

    def die(self, *, in_order: bool = False) -> None:
        """The process is gone, with all that ran in it."""
        self.is_dead = True
        self.cluster.seats.pop(self.name, None)
        self.context.run(self.host.hear, pickle.dumps(Stop(for_good=True)))
        self.cluster.later(partial(self.cluster.listener.left, died=not in_order), self.name)

    def fall_silent(self) -> None:
        """As a process that is stopped, or whose loop is blocked."""
        self.is_silent = True

    def wake(self) -> None:
        """It goes on, with all that it had to say."""
        self.is_silent = False
        held, self.held = self.held, []
        for action in held:
            action()


class FakeCluster:
    """An executor.

    :param seats: that are there in the beginning.
    :param delay_s: seconds that bytes take.
    :param says_after_s: the same for what seats say, where that is more.
    :param restarts: a process that dies is followed by a new one after a second.
    """

    def __init__(
        self,
        seats: int = 2,
        *,
        delay_s: float = 0.005,
        lease_s: float = 5.0,
        patience_s: float = 20.0,
        restarts: bool = False,
        says_after_s: float | None = None,
    ) -> None:
        self._first = seats
        self.says_after_s = delay_s if says_after_s is None else says_after_s
        self._delay_s, self._lease_s, self._patience_s = delay_s, lease_s, patience_s
        self._restarts = restarts
        self._worker: Any = None
        self._named = 0
        self._on_the_way: dict[float, deque[tuple[Any, tuple[Any, ...]]]] = {}
        self.listener: Listener
        self.assignment: Assignment
        self.seats: dict[str, FakeSeat] = {}
        self.all_seats: list[FakeSeat] = []
        self.deaths = 0
        self.runs: Counter[Any] = Counter()

    async def connect(self, worker: Worker) -> None:
        self._worker = worker

    def pool(self, work: Work) -> WorkerPool:
        return ChunkPool(self, work, self._worker, lease_s=self._lease_s, patience_s=self._patience_s)

    async def begin(self, assignment: Assignment, listener: Listener) -> None:
        self.assignment, self.listener = assignment, listener
        for _ in range(self._first):
            self.add()

    def add(self) -> FakeSeat:
        """A process joins."""
        self._named += 1
        seat = FakeSeat(self, f"seat-{self._named}")
        seat.begin(self.assignment)
        self.seats[seat.name] = seat
        self.all_seats.append(seat)
        self.later(self.listener.joined, seat.name, seat.name)
        return seat

    def send(self, seat: str, message: bytes) -> None:
        if seat in self.seats:
            self.later(self.seats[seat].hear, message)

    async def close(self) -> None:
        for seat in list(self.seats.values()):
            await seat.host.stop(for_good=True)
        self.seats.clear()

    def later(self, action: Any, *args: Any, after_s: float | None = None) -> None:
        """Bytes keep their order, which timers of the same moment do not."""
        after_s = self._delay_s if after_s is None else after_s
        on_the_way = self._on_the_way.setdefault(after_s, deque())
        on_the_way.append((action, args))
        asyncio.get_running_loop().call_later(after_s, self._arrive, on_the_way)

    def _arrive(self, on_the_way: deque[tuple[Any, tuple[Any, ...]]]) -> None:
        action, args = on_the_way.popleft()
        action(*args)

    def kill_here(self) -> None:
        """The worker that calls it kills the process that it runs in."""
        self.deaths += 1
        seat = SEAT.get()
        seat.die()
        if self._restarts:
            asyncio.get_running_loop().call_later(1.0, self.add)


def note(item: Any) -> FakeSeat:
    """The worker says that an item has begun in this seat."""
    seat = SEAT.get()
    seat.began.append(item)
    seat.cluster.runs[item] += 1
    return seat
