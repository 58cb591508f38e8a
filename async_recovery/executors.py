"""Where the attempts of a run happen: the contract between the engine and what runs the worker.

Without an executor, that is the process of the run: `pool.Pool`. An executor runs it elsewhere; cursor, admission,
collector and commit stay where they are, and with them every decision.

::

    engine ── WorkerPool ──┬── Pool            tasks in this process
                           └── ChunkPool ── Cluster ── seats: processes, each with one event loop
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec

from .admission import Admission
from .collector import Collector
from .cursor import Cursor
from .errors import UsageError, shorten
from .progress import Seen
from .workers import Worker

SIGN_OF_LIFE_S = 0.5  # seat and run say at least so often that they are there


class Work(NamedTuple):
    """All that a pool elsewhere is given for one run.

    :ivar admission: hands out attempts, and takes back what has not begun.
    :ivar cursor: whose waiters are woken when more may be handed out.
    :ivar collector: takes the records.
    :ivar timeout: seconds an attempt may take; None: any time.
    :ivar has_deadline: whether the whole time of an item is bounded, which `admission` knows.
    :ivar keeps_records: whether results are written; otherwise only that they are there.
    :ivar place: what the run holds the lock of; None if that has no name.
    :ivar failed: called with index, item, what was raised, and when the attempt began if that is known.
    :ivar give_up: called with index, item and why, for an item that is not tried again whatever the policy.
    :ivar broken: called with what ends the run.
    :ivar commit_helps: whether a commit would let more items out.
    :ivar commit_due: called when a commit is due.
    """

    admission: Admission
    cursor: Cursor
    collector: Collector
    timeout: float | None
    has_deadline: bool
    keeps_records: bool
    place: str | None
    failed: Callable[[int, Any, BaseException, float | None], None]
    give_up: Callable[[int, Any, BaseException], None]
    broken: Callable[[BaseException], None]
    commit_helps: Callable[[], bool]
    commit_due: Callable[[], None]


@runtime_checkable
class Executor(Protocol):
    """Runs the worker somewhere else. One executor runs one job at a time.

    The run calls `connect`, then `pool` at most once, and `close` in any case, unless `connect` raised.
    """

    async def connect(self, worker: Worker) -> None:
        """Get ready to run `worker`; nothing of the job has been touched yet. If it raises, it leaves nothing behind.

        :raises UsageError: if it can not be run there: the message says on which machine, and why.
        :raises NoWorkers: if there is nobody to run it.
        """
        ...

    def pool(self, work: Work) -> WorkerPool:
        """What runs the worker for one run."""
        ...

    async def close(self) -> None:
        """End what still runs, and let go. Can be called at any time, and more than once."""
        ...


class WorkerPool(Protocol):
    """What the engine asks of whatever runs the worker.

    :ivar ended: nothing runs any more, but what was left alone.
    :ivar let_go: indices whose attempt has ended without an outcome.
    """

    ended: bool
    let_go: set[int]

    async def run(self, concurrency: int) -> None:
        """Until there is nothing left to do, or it is cancelled."""
        ...

    def set_concurrency(self, concurrency: int) -> None:
        """So many items at once from now on."""
        ...

    def drain(self, timeout: float) -> None:
        """Begin nothing more, and cancel what has not ended in `timeout` seconds."""
        ...

    def cancel(self) -> None:
        """Cancel what is in flight."""
        ...

    def why_paused(self) -> str | None:
        """Why nothing runs, for people; None if that is not so."""
        ...

    def seen(self) -> tuple[Seen, ...]:
        """The processes that run the worker; none but our own: empty."""
        ...


class Assignment(msgspec.Struct, frozen=True):
    """What a seat is told of the run that it works for.

    :ivar run: names this run among all others, and this connection to the cluster.
    :ivar place: what the run holds the lock of: whoever else worked for it is fenced.
    :ivar worker: ``module:function``, or a worker of ours as it is.
    :ivar timeout: seconds an attempt may take.
    :ivar has_deadline: whether items come with a time of their own.
    :ivar keeps_records: whether results are to be sent.
    :ivar lease_s: seconds of silence after which what a seat has is given out again.
    """

    run: str
    place: str | None
    worker: Any
    timeout: float | None
    has_deadline: bool
    keeps_records: bool
    lease_s: float


class Chunk(msgspec.Struct, frozen=True):
    """To a seat: items to run.

    :ivar indices: of the items, in the order in which they are to begin.
    :ivar items: each of them, pickled.
    :ivar bounds: seconds that each attempt may take by the deadline of its item; empty if there are none.
    :ivar share: so many items may run at once there.
    :ivar is_rated: there is a rate limit: it is to be told at once which of them have begun.
    """

    indices: list[int]
    items: list[bytes]
    bounds: list[float]
    share: int
    is_rated: bool


class Share(msgspec.Struct, frozen=True):
    """To a seat: so many items may run at once from now on."""

    share: int


class Here(msgspec.Struct, frozen=True):
    """To a seat: the run is there. One that hears nothing for about a lease is not heard either, and begins nothing."""


class Recall(msgspec.Struct, frozen=True):
    """To a seat: give back what has not begun, and go on if it has stood still."""


class Stop(msgspec.Struct, frozen=True):
    """To a seat: give back what has not begun, cancel the rest, and say when it has ended.

    :ivar for_good: the run is over; otherwise it goes on with what comes next.
    """

    for_good: bool


class Failed(msgspec.Struct, frozen=True):
    """An attempt that failed.

    :ivar error: what was raised, pickled; see `carried.pack`.
    :ivar took: seconds, if somebody asked for them.
    """

    index: int
    error: bytes
    took: float | None


class Told(msgspec.Struct, frozen=True):
    """From a seat: what has happened since it last told something; nothing at all is a sign of life.

    :ivar records: index and record of each result.
    :ivar failures: attempts that failed.
    :ivar returned: indices that have not begun and never will, there.
    :ivar cancelled: indices whose attempt was cancelled.
    :ivar begun: indices of attempts that have begun, where that was asked for.
    :ivar running: how many run there now, under `share`: more, for a while, after that has become less.
    :ivar shares: how many messages with a share have come so far.
    :ivar recalled: a `Recall` is done.
    :ivar stopped: a `Stop` is done.
    :ivar stood_still: it did, or heard nothing, for about a lease: it gives back all that has not begun until a
        `Recall` or `Stop` comes.
    """

    records: list[tuple[int, bytes]]
    failures: list[Failed]
    returned: list[int]
    cancelled: list[int]
    begun: list[int]
    running: int
    share: int
    shares: int
    recalled: bool
    stopped: bool
    stood_still: bool


class Listener(Protocol):
    """Hears what happens on a cluster. Everything is called on the loop of the run."""

    def joined(self, seat: str, name: str) -> None:
        """A process is ready to work.

        :param seat: names the process among all that ever were.
        :param name: for people.
        """
        ...

    def left(self, seat: str, *, died: bool) -> None:
        """The process is gone, and all that ran in it.

        :param died: it did not leave in order: what ran there may have been the cause.
        """
        ...

    def heard(self, seat: str, told: bytes) -> None:
        """A pickled `Told`."""
        ...


class Cluster(Protocol):
    """Processes that run the worker, and the way to them: bytes arrive in their order, or the seat has left."""

    async def begin(self, assignment: Assignment, listener: Listener) -> None:
        """Seat the run on each process that is there, and on each that comes.

        :raises UsageError: if it can not be run on one of those that are there.
        """
        ...

    def send(self, seat: str, message: bytes) -> None:
        """Send a pickled message to a seat; to one that has left, nothing is sent."""
        ...


def check_executor(executor: Any) -> None:
    """:raises UsageError: if it is no executor."""
    if executor is not None and not isinstance(executor, Executor):
        raise UsageError(f"executor is {shorten(executor)}: it must be an Executor such as DaskExecutor(...), or None")
