"""Ways to cancel a call of `run_resumable`, and the moments at which they do: every round of the loop, and every
operation on files while the writer thread is in it.

One cancellation again::

    .venv/bin/python -m tests.proof.cancellations "file/native/round 17"
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import anyio

from async_recovery import FileLedger, IterableSource, Limits, RunSummary, file_ledger
from async_recovery.engine import Run, to_its_end
from async_recovery.lock import Lock
from async_recovery.options import Options
from tests.support.commands import DEADLINE_S, POLL_S, wait_until
from tests.support.faulty_files import READING, FaultyFiles
from tests.support.file_jobs import committed, names_in
from tests.support.threaded_loop import ThreadedLoop, run
from tests.support.virtual_loop import Hang
from tests.test_engine import World

from .cancelled_mutants import MUTANTS
from .forks import quick_folder

ITEMS = 7
DRAIN_S = 0.4
FAR_S = 1e6
ROUNDS_BETWEEN = 3

Call = Callable[[], Coroutine[Any, Any, RunSummary]]


# When


class Moment:
    """When it happens.

    :ivar came: whether it did.
    """

    came = False

    def does(self, first: Callable[[], object], second: Callable[[], object] | None = None) -> None:
        """Let `first` happen then, and `second` a little later. Called on the loop, before the call begins."""

        def happens() -> None:
            self.came = True
            first()

        self._arrange(happens, second or _nothing)

    def _arrange(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        raise NotImplementedError

    def is_over(self) -> None:
        """What has not happened yet never will."""


class Round(Moment):
    """At the beginning of a round of the loop; the second thing so many rounds later."""

    def __init__(self, number: int, between: int = ROUNDS_BETWEEN) -> None:
        self._number, self._between = number, between

    def _arrange(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ThreadedLoop)
        number = loop.steps + 1 + self._number
        actions = {number: first, number + self._between: second}

        def on_step(number: int) -> None:
            actions.pop(number, _nothing)()

        loop.on_step = on_step

    def is_over(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ThreadedLoop)
        loop.on_step = None


class Operation(Moment):
    """While the writer thread is in an operation on files, which goes on when the loop has had its say."""

    def __init__(self, number: int, files: WatchedFiles) -> None:
        self._number, self._files = number, files

    def _arrange(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()

        def in_thread() -> None:
            heard = threading.Event()

            def later(rounds: int, action: Callable[[], object]) -> None:
                loop.call_soon(later, rounds - 1, action) if rounds else action()

            def on_loop() -> None:
                first()
                later(ROUNDS_BETWEEN, second)
                later(3 * ROUNDS_BETWEEN, heard.set)

            loop.call_soon_threadsafe(on_loop)
            while not heard.wait(POLL_S) and not loop.is_closed():
                pass

        self._files.interrupt = (self._number, in_thread)


def _nothing() -> None:
    pass


# How


def _me() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def native(call: Call, moment: Moment, *, twice: bool = False) -> bool:
    """``task.cancel()`` from outside, and the task is then cancelled."""
    task = asyncio.ensure_future(call())
    moment.does(task.cancel, task.cancel if twice else None)
    await asyncio.wait({task})
    assert task.cancelled() or not task.cancelling(), "the cancellation is lost"
    return task.cancelled()


async def own_task(call: Call, moment: Moment, *, twice: bool = False) -> bool:
    """The task that calls is cancelled; it catches that, and can go on when it has said so."""
    me = _me()
    moment.does(me.cancel, me.cancel if twice else None)
    try:
        await call()
    except asyncio.CancelledError:
        assert 1 <= me.cancelling() <= 1 + twice, f"cancelling() is {me.cancelling()}"
        while me.cancelling():
            me.uncancel()
        return True
    return False


async def by_timeout(call: Call, moment: Moment) -> bool:
    """``asyncio.timeout`` expires."""
    try:
        async with asyncio.timeout(FAR_S):
            moment.does(_expire)
            await call()
    except TimeoutError:
        return True
    return False


async def by_timeout_and_natively(call: Call, moment: Moment) -> bool:
    """``asyncio.timeout`` expires, and while the call drains its task is cancelled: that is what comes out."""
    me, second = _me(), list[bool]()
    try:
        async with asyncio.timeout(FAR_S):
            moment.does(_expire, lambda: second.append(me.cancel()))
            await call()
    except TimeoutError:
        assert not second, "the cancellation is lost in the timeout"
        return True
    except asyncio.CancelledError:
        assert second
        assert me.cancelling() == 1
        me.uncancel()
        return True
    return False


async def by_wait_for(call: Call, moment: Moment) -> bool:
    """``asyncio.wait_for`` expires."""
    moment.does(_expire)
    try:
        await asyncio.wait_for(call(), FAR_S)
    except TimeoutError:
        return True
    return False


async def by_scope(call: Call, moment: Moment) -> bool:
    """An anyio scope is cancelled, and catches it."""
    with anyio.CancelScope() as scope:
        moment.does(scope.cancel)
        await call()
    return scope.cancelled_caught


async def by_fail_after(call: Call, moment: Moment) -> bool:
    """The deadline of ``fail_after`` passes."""
    try:
        with anyio.fail_after(FAR_S) as scope:
            moment.does(functools.partial(_pass_deadline, scope))
            await call()
    except TimeoutError:
        return True
    return False


async def by_scope_and_natively(call: Call, moment: Moment) -> bool:
    """A scope is cancelled, and while the call drains its task is, too: the scope must not catch that."""
    me, second = _me(), list[bool]()
    try:
        with anyio.CancelScope() as scope:
            moment.does(scope.cancel, lambda: second.append(me.cancel()))
            await call()
    except asyncio.CancelledError:
        assert second
    else:
        assert not second or not scope.cancelled_caught, "the cancellation is lost in the scope"
        if not scope.cancelled_caught:
            return False
    while me.cancelling():
        me.uncancel()
    return True


async def natively_and_by_scope(call: Call, moment: Moment) -> bool:
    """A task is cancelled, and while the call drains a scope around it is, too: the first comes out."""
    me = _me()
    try:
        with anyio.CancelScope() as scope:
            moment.does(me.cancel, scope.cancel)
            await call()
    except asyncio.CancelledError:
        while me.cancelling():
            me.uncancel()
        return True
    assert not me.cancelling(), "the cancellation is lost in the scope"
    return False


async def tear_down(call: Call, moment: Moment) -> bool:
    """The main coroutine returns while the call goes on: the runner of the loop cancels every task there is."""
    reached = asyncio.Event()
    task = asyncio.ensure_future(call())
    moment.does(reached.set)
    stop = asyncio.ensure_future(reached.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    return not task.done()


async def tear_off(call: Call, moment: Moment) -> bool:
    """The loop ends with this very round: its runner cancels every task there is, even one that has not begun."""
    moment.does(asyncio.get_running_loop().stop)
    await call()
    return False


def _expire() -> None:
    """Let the timer that is far away be due now."""
    loop: Any = asyncio.get_running_loop()
    for handle in [handle for handle in loop._scheduled if handle.when() >= FAR_S and not handle.cancelled()]:
        handle._run()
        handle.cancel()


def _pass_deadline(scope: anyio.CancelScope) -> None:
    scope.deadline = anyio.current_time()


Way = Callable[[Call, Moment], Coroutine[Any, Any, bool]]
WAYS: dict[str, Way] = {
    "native": native,
    "native, twice": functools.partial(native, twice=True),
    "own task": own_task,
    "own task, twice": functools.partial(own_task, twice=True),
    "timeout": by_timeout,
    "timeout, then native": by_timeout_and_natively,
    "wait_for": by_wait_for,
    "scope": by_scope,
    "fail_after": by_fail_after,
    "scope, then native": by_scope_and_natively,
    "native, then scope": natively_and_by_scope,
    "tear-down": tear_down,
    "tear-off": tear_off,
}
TORN = ("tear-down", "tear-off")


# Where


class Place(Protocol):
    """A job, and what is kept of it between its lives."""

    def call(self) -> Coroutine[Any, Any, RunSummary]:
        """One life."""

    def returned(self) -> None:
        """From now on nothing may be written."""

    def check(self, *, torn: bool) -> None:
        """What finished is committed, the lock is given up, and the next life ends the job."""


class Memory(World):
    """In the memory ledger.

    :param careless: a cancellation cuts its calls short.
    """

    def __init__(self, *, careless: bool = False) -> None:
        super().__init__(list(range(ITEMS)), 2, limits=Limits(window=5), drain_timeout=DRAIN_S)
        self.interruptible = careless
        self._commits = 0

    def call(self) -> Coroutine[Any, Any, RunSummary]:
        return self.live()

    def returned(self) -> None:
        self._commits = len(self.store.commits)

    def check(self, *, torn: bool) -> None:
        store = self.store
        assert not store.locked, "the lock is not given up"
        assert len(store.commits) == self._commits, "a commit came after the call had returned"
        if store.published is None:
            lost = self.finished - store.committed
            assert not lost or (torn and self.interruptible), f"{lost} had finished, and are not committed"
            assert store.committed <= self.finished
            run(self.call())
        self.check_finished()


class WatchedFiles(FaultyFiles):
    """Files of which is known when they are touched.

    :ivar interrupt: a number of an operation, and what is to be done in its thread before it.
    :ivar late: operations after the call had returned, and `unlocked` those while its lock was not there.
    """

    def __init__(self, lock: Path) -> None:
        super().__init__()
        self.interrupt: tuple[int, Callable[[], None]] | None = None
        self.returned = False
        self.late: list[str] = []
        self.unlocked: list[str] = []
        self._lock = lock

    def _call(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        if self.interrupt is not None and self.interrupt[0] == len(self.calls):
            (_, act), self.interrupt = self.interrupt, None
            act()
        if self.returned and name != "pread":  # when a loop is torn down, the audit's thread may read to the end
            self.late.append(name)
        if name not in READING and not self._lock.exists():
            self.unlocked.append(name)
        return super()._call(name, operation, *args)


class OnFiles:
    """In the file ledger, on real files.

    :ivar patience_s: how long a thread may take to end.
    """

    patience_s = DEADLINE_S

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out.jsonl"
        self.journal = folder / "out.jsonl.checkpoint"
        self.ran: list[int] = []
        self.finished: set[int] = committed(self.journal)
        self.before = set(self.finished)
        self.files = WatchedFiles(folder / "out.jsonl.lock")

    async def worker(self, item: int) -> dict[str, int]:
        self.ran.append(item)
        await asyncio.sleep(item * 7 % 5 * 0.3)
        self.finished.add(item)
        return {"did": item}

    def call(self) -> Coroutine[Any, Any, RunSummary]:
        options = Options(concurrency=2, limits=Limits(window=5), checkpoint_interval=0.5, drain_timeout=DRAIN_S)
        ledger = FileLedger(self.output, files=self.files)
        return to_its_end(Run(self.worker, IterableSource(range(ITEMS)), ledger, options))

    def returned(self) -> None:
        self.files.returned = True

    def check(self, *, torn: bool) -> None:
        wait_until(lambda: not _writer_threads(), within_s=self.patience_s)
        assert not self.files.unlocked, f"{self.files.unlocked} came while the lock was not held"
        assert not self.files.late, f"{self.files.late} came after the call had returned"
        assert not self.before & set(self.ran), "a committed item ran again"
        lock = Lock(str(self.folder / "out.jsonl.lock"))
        assert not (self.folder / "out.jsonl.lock").exists(), "the lock's file is left"
        lock.acquire()
        lock.release()
        if not self.output.exists():
            kept = committed(self.journal)
            assert kept == self.finished, f"committed are {kept}, finished were {self.finished}"
            left = {"out.jsonl.partial", "out.jsonl.checkpoint"} if kept else set()
            assert names_in(self.folder) == left, f"left are {names_in(self.folder)}"
            again = OnFiles(self.folder)
            run(again.call())
            assert sorted(again.ran) == sorted(set(range(ITEMS)) - kept), "another life did not run what was missing"
        assert names_in(self.folder) == {"out.jsonl"}
        assert self.output.read_bytes() == b"".join(b'{"index":%d,"did":%d}\n' % (n, n) for n in range(ITEMS))


def _writer_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("async_recovery-writer")]


@contextlib.contextmanager
def place(name: str) -> Iterator[Place]:
    """The place of that name."""
    if "memory" in name:
        yield Memory(careless="careless" in name)
        return
    with quick_folder() as folder, mock.patch.object(file_ledger, "AUDIT_BYTES", 32):
        if name == "resumed file":
            before = OnFiles(folder)

            async def interrupted() -> None:
                with anyio.move_on_after(1):
                    await before.call()

            run(interrupted())
            assert 0 < len(committed(before.journal)) < ITEMS
        yield OnFiles(folder)


# Everything


def shares() -> list[tuple[str, str, str]]:
    """Every way, each in memory and on files; a careless ledger differs only if its own task is cancelled."""
    on_files = [("file", way, kind) for way in WAYS for kind in ("round", "operation")]
    careless = [("careless memory", way, "round") for way in TORN]
    return on_files + [("memory", way, "round") for way in WAYS] + careless


def pairs() -> list[tuple[str, str, str]]:
    """Two cancellations, so many rounds apart."""
    ways = [way for way in WAYS if "then" in way or "twice" in way]
    places = ("file", "resumed file", "memory")
    return [(place, way, f"round+{between}") for place in places for way in ways for between in range(1, 40)]


class Tally(NamedTuple):
    """What a sweep counted.

    :ivar moments: how many there were, and `cancelled` how many of them came before the call had ended.
    """

    moments: int
    cancelled: int
    violations: list[str]


def happens(where: str, how: str, when: str) -> tuple[bool, bool]:
    """One cancellation, and all that must hold after it: whether its moment came, and whether it cancelled the call."""
    with place(where) as job:
        kind, *numbers = when.split()
        if kind == "round":
            moment: Moment = Round(*map(int, numbers))
        else:
            assert isinstance(job, OnFiles)
            moment = Operation(int(numbers[0]), job.files)

        async def main() -> bool:
            cancelled = await WAYS[how](job.call, moment)
            moment.is_over()
            if how not in TORN:
                job.returned()
                left = asyncio.all_tasks() - {_me()}
                assert not left, f"it outlives its scope: {left}"
                assert _me().cancelling() == 0, f"cancelling() is {_me().cancelling()}"
                await asyncio.sleep(1)
            return cancelled

        try:
            cancelled = run(main())
        except RuntimeError as error:
            if how != "tear-off":
                raise AssertionError(f"{error!r} came out") from error
            cancelled = True
        job.returned()
        job.check(torn=how in TORN)
    return moment.came, cancelled


def sweep(share: tuple[str, str, str], mutant: str | None = None) -> Tally:
    """One way in one place at every moment of a kind, until the call ends before the moment comes.

    With a mutant until the first violation.
    """
    where, how, kind = share
    moments = cancelled = 0
    violations: list[str] = []
    # When a loop is torn down, Python says what its tasks ended with, and which of them never began.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for logger in ("async_recovery", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    if mutant:
        OnFiles.patience_s = 0.5
    with MUTANTS[mutant].patch() if mutant else contextlib.nullcontext():
        while not (mutant and violations):
            name, _, between = kind.partition("+")
            when = f"{name} {moments} {between}".strip()
            try:
                came, did = happens(where, how, when)
            except (AssertionError, Hang, asyncio.CancelledError) as error:
                violations.append(f'python -m tests.proof.cancellations "{where}/{how}/{when}": {error!r}')
                came, did = True, True
            if not came:
                break
            moments, cancelled = moments + 1, cancelled + did
    return Tally(moments, cancelled, violations)


if __name__ == "__main__":
    print(happens(*sys.argv[1].split("/")))
