"""The engine on a clock of its own: crashes, cancellations, stragglers and windows, without a single real second."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from async_recovery import (
    IncompleteRun,
    InputChanged,
    ItemFailed,
    IterableSource,
    Limits,
    Page,
    Progress,
    ResultRefused,
    RunSummary,
    Source,
    Stopped,
    StorageFailed,
    UsageError,
    sources,
)
from async_recovery.checkpoint import Bookmark
from async_recovery.collector import Collector
from async_recovery.cursor import Cursor
from async_recovery.engine import Run, to_its_end
from async_recovery.options import Options
from async_recovery.pool import CANCEL_AGAIN_S, TURN_ITEMS, Pool
from async_recovery.records import encode_record
from async_recovery.watermark import Watermark

from .support.fake_cluster import FakeCluster
from .support.memory_ledger import MemoryLedger, Store
from .support.virtual_loop import Hang, VirtualLoop, at_round, run_virtual

DIE = "die"


class World:
    """One job over the lives of several processes: its input, its store, and which items ran in which life.

    :cvar is_elsewhere: its items run in two processes of a cluster.
    """

    is_elsewhere = False

    def __init__(self, items: list[Any], concurrency: int, **options: Any) -> None:
        self.items = items
        self.store = Store()
        self.lives: list[list[int]] = []
        self.finished: set[int] = set()
        self.interruptible = False
        self.committed_before: list[set[int]] = []
        self.options = {"checkpoint_interval": 0.5, "drain_timeout": 1.0, **options}
        self.concurrency = concurrency
        self.latency: Callable[[int], float] = lambda index: (index * 7 % 5) * 0.3

    async def worker(self, item: tuple[int, Any]) -> dict[str, Any]:
        """Takes a while that depends on the item; an item that says so ends the first process that it runs in."""
        index, what = item
        if not self.store.dead:
            self.lives[-1].append(index)
        await asyncio.sleep(self.latency(index))
        if what == DIE and len(self.lives) == 1:
            self.store.dead = True
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
        if not self.store.dead:
            self.finished.add(index)
        return {"what": what}

    def run(self, **options: Any) -> Run:
        self.store.reborn()
        self.lives.append([])
        self.committed_before.append(set(self.store.committed))
        executor = World.executor()
        chosen = Options(**{"concurrency": self.concurrency, "executor": executor, **self.options, **options})
        return Run(
            self.worker, IterableSource(list(enumerate(self.items))), MemoryLedger(self.store, delay=0.01), chosen
        )

    @staticmethod
    def executor() -> FakeCluster | None:
        """Who runs the items."""
        return FakeCluster(2, delay_s=0.001) if World.is_elsewhere else None

    async def live(self, **options: Any) -> RunSummary:
        return await to_its_end(self.run(**options))

    def live_for(self, seconds: float, **options: Any) -> None:
        """The process is killed after that time: what had not reached the store by then never does."""

        async def main() -> None:
            task = asyncio.ensure_future(self.live(**options))
            await asyncio.sleep(seconds)
            self.store.dead = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        run_virtual(main())

    def check_nothing_paid_twice(self) -> None:
        """No item that was committed when a process began runs in it."""
        for ran, committed in zip(self.lives, self.committed_before, strict=True):
            assert not committed & set(ran)
            assert len(ran) == len(set(ran))

    def check_finished(self) -> None:
        """The output is that of a run that was never disturbed."""
        expected = [encode_record(index, {"what": what}) for index, what in enumerate(self.items)]
        assert self.store.published == expected
        self.check_nothing_paid_twice()


@pytest.fixture(params=["in this process", "on a cluster"])
def _everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of crashes and cancellations holds wherever the items run."""
    monkeypatch.setattr(World, "is_elsewhere", request.param == "on a cluster")


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize("concurrency", [1, 2, 3, 8])
@pytest.mark.parametrize("interval", [0, 0.5, 100])
@pytest.mark.parametrize("crash_at", range(9))
def test_a_crash_at_any_item_changes_nothing(concurrency: int, interval: float, crash_at: int) -> None:
    """The process dies in item k; the next one finishes the very output, and pays for nothing that was committed."""
    world = World(
        [DIE if index == crash_at else index for index in range(9)], concurrency, checkpoint_interval=interval
    )
    with pytest.raises(RuntimeError, match="Event loop stopped"):
        run_virtual(world.live())
    assert world.store.published is None
    summary = run_virtual(world.live())
    world.check_finished()
    assert summary.resumed_from + summary.executed <= 9
    assert summary.executed == len(world.lives[1])


@pytest.mark.usefixtures("_everywhere")
def test_an_interrupted_run_resumes_with_its_window_full_of_gaps() -> None:
    """What was ahead at the crash is not run again; the gaps between are filled at full concurrency."""
    world = World(list(range(40)), 4, checkpoint_interval=0.1)
    world.latency = lambda index: 50.0 if index % 10 == 0 else 0.1

    world.live_for(40)
    done = set(world.store.committed)
    assert done == set(world.store.ahead) == set(range(30)) - {0, 10, 20}
    run_virtual(world.live())
    world.check_finished()
    assert set(world.lives[1]) == set(range(40)) - done


Canceller = Callable[[World, int, float], None]


def cancel_natively(world: World, step: int, drain: float) -> None:
    """``task.cancel()`` at the given round of the loop."""

    async def main() -> None:
        task = asyncio.ensure_future(world.live(drain_timeout=drain))
        at_round(step, task.cancel)
        await task

    run_virtual(main())


def cancel_by_scope(world: World, step: int, drain: float) -> None:
    """An anyio cancel scope around the call."""

    async def main() -> None:
        with anyio.CancelScope() as scope:
            at_round(step, scope.cancel)
            await world.live(drain_timeout=drain)
        if scope.cancelled_caught:
            raise asyncio.CancelledError

    run_virtual(main())


def cancel_twice(world: World, step: int, drain: float) -> None:
    """A second ``task.cancel()`` three rounds after the first."""

    async def main() -> None:
        task = asyncio.ensure_future(world.live(drain_timeout=drain))
        at_round(step, task.cancel, again_after=3)
        await task

    run_virtual(main())


def tear_down(world: World, step: int, drain: float) -> None:
    """The main coroutine returns while the run goes on: ``asyncio.run`` cancels every task there is."""

    async def main() -> None:
        reached = asyncio.Event()
        task = asyncio.ensure_future(world.live(drain_timeout=drain))
        at_round(step, reached.set)
        stop = asyncio.ensure_future(reached.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            raise asyncio.CancelledError
        stop.cancel()

    run_virtual(main())


@pytest.mark.parametrize("drain", [0.0, 0.4, 10.0])
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("cancel", [cancel_natively, cancel_by_scope, cancel_twice, tear_down])
def test_a_cancellation_at_any_await_loses_nothing(
    cancel: Canceller, concurrency: int, drain: float, caplog: pytest.LogCaptureFixture, *, interruptible: bool
) -> None:
    """Cancelled at every round of the loop in turn, a run keeps what was finished, and the next one completes it."""
    caplog.set_level(logging.CRITICAL, logger="async_recovery")
    cancel_at_every_await(cancel, concurrency, drain, interruptible=interruptible)


@pytest.mark.parametrize("drain", [0.0, 0.4, 10.0])
@pytest.mark.parametrize("cancel", [cancel_natively, cancel_by_scope, cancel_twice])
def test_a_cancellation_at_any_await_loses_nothing_on_a_cluster(
    cancel: Canceller, drain: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same; what was finished there is told before the run ends. (A tear-down would take the processes along.)"""
    caplog.set_level(logging.CRITICAL, logger="async_recovery")
    monkeypatch.setattr(World, "is_elsewhere", True)
    cancel_at_every_await(cancel, 3, drain, interruptible=False)


def cancel_at_every_await(cancel: Canceller, concurrency: int, drain: float, *, interruptible: bool) -> None:
    """One job after the other, until one ends before it is cancelled."""
    step, cancelled = 1, 0
    while True:
        world = World(list(range(7)), concurrency)
        world.interruptible = interruptible
        try:
            cancel(world, step, drain)
        except asyncio.CancelledError:
            cancelled += 1
        else:
            if world.store.published is not None:
                break
        if world.store.published is None:
            assert not world.store.locked
            if not (interruptible and cancel is tear_down):  # then a commit may be cut, and is not acknowledged
                assert world.finished == world.store.committed
            run_virtual(world.live())
        world.check_finished()
        step += 1
    assert cancelled > 20


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # what anyio leaves of a task without a turn
def test_the_loop_can_be_torn_down_before_a_task_has_had_its_first_turn() -> None:
    """``asyncio.run`` ends, whichever tasks of the run have only just been made; nothing that finished is lost."""
    for rounds in range(80):
        world = World(list(range(3)), 2)
        world.latency = lambda index: 0.0

        async def main(world: World = world, rounds: int = rounds) -> None:
            world.lives.append([])
            ledger = MemoryLedger(world.store)
            run = Run(world.worker, IterableSource(list(enumerate(world.items))), ledger, Options(concurrency=2))
            task = asyncio.ensure_future(to_its_end(run))
            for _ in range(rounds):
                await asyncio.sleep(0)
            assert task.done() or rounds < 79

        run_virtual(main())
        assert not world.store.locked
        assert world.store.published is not None or world.finished == world.store.committed


def test_a_tear_down_before_the_work_has_begun_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is cancelled before its first step never says that it has ended."""
    persist = Run._persist

    async def torn_down(self: Run) -> None:
        monkeypatch.setattr(Run, "_persist", persist)
        for task in asyncio.all_tasks():
            task.cancel()
        await self._persist()

    monkeypatch.setattr(Run, "_persist", torn_down)
    store = Store()
    run = Run(_echo, IterableSource(range(5)), MemoryLedger(store), Options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Python says that the two coroutines never began
        with pytest.raises(asyncio.CancelledError):
            run_virtual(asyncio.wait_for(to_its_end(run), 100))
        gc.collect()
    assert not store.locked
    assert store.published is None


@pytest.mark.usefixtures("_everywhere")
def test_cancelling_keeps_what_finishes_within_the_drain_timeout() -> None:
    """Items in flight get their time; what is not done by then is cancelled; all that finished is committed."""
    world = World(list(range(4)), 4, checkpoint_interval=100)
    world.latency = lambda index: [5.0, 1.0, 2.0, 30.0][index]

    async def main() -> float:
        task = asyncio.ensure_future(world.live(drain_timeout=6.0))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(6.5, abs=0.1)
    assert world.store.committed == {0, 1, 2}


@pytest.mark.usefixtures("_everywhere")
def test_a_second_cancellation_does_not_wait() -> None:
    """The second cancellation cancels what is in flight, and what has finished is committed all the same."""
    world = World(list(range(4)), 4, checkpoint_interval=100)
    world.latency = lambda index: 1.0 if index == 2 else 1000.0

    async def main() -> float:
        task = asyncio.ensure_future(world.live(drain_timeout=500.0))
        await asyncio.sleep(2)
        task.cancel()
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 4
    assert world.store.committed == {2}


@pytest.mark.usefixtures("_everywhere")
def test_a_timeout_around_the_call_is_a_timeout() -> None:
    """``asyncio.timeout`` sees its own cancellation, after the drain."""
    world = World(list(range(100)), 2)

    async def main() -> None:
        async with asyncio.timeout(3):
            await world.live()

    with pytest.raises(TimeoutError):
        run_virtual(main())
    assert world.store.committed
    run_virtual(world.live())
    world.check_finished()


def test_the_first_failure_stops_and_keeps_what_was_in_flight() -> None:
    """A failing item ends the run with its index and cause; what was in flight drains and is committed."""
    world = World(list(range(20)), 4, checkpoint_interval=100)
    inner = world.worker

    async def worker(item: tuple[int, Any]) -> dict[str, Any]:
        if item[0] == 5 and len(world.lives) == 1:
            raise ValueError("no such page")
        return await inner(item)

    world.worker = worker  # type: ignore[method-assign]
    with pytest.raises(ItemFailed, match=r"item 5 .*ValueError: no such page") as caught:
        run_virtual(world.live())
    assert caught.value.index == 5
    assert isinstance(caught.value.__cause__, ValueError)
    assert world.store.committed == set(world.lives[0])
    run_virtual(world.live())
    world.check_finished()
    assert 5 in world.lives[1]


def test_further_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """While the run drains, other items may fail: the first error is raised, the others are told of in short."""

    async def worker(item: int) -> int:
        await asyncio.sleep(item)
        raise ValueError(f"bad {item}")

    run = Run(worker, IterableSource([1, 2, 3]), MemoryLedger(Store()), Options(concurrency=3, drain_timeout=2.5))
    with pytest.raises(ItemFailed, match="bad 1"):
        run_virtual(to_its_end(run))
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [("WARNING", f"item {index} ({index + 1}) failed: ValueError: bad {index + 1}") for index in (1, 2)]


def test_further_failures_for_one_reason_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that always fails does not fill the log: each reason is told once, and how many have failed besides."""

    async def worker(item: int) -> object:
        await asyncio.sleep(item)
        return {item} if item < 12 else 1 / 0

    run = Run(worker, IterableSource(range(16)), MemoryLedger(Store()), Options(concurrency=16, drain_timeout=20))
    with pytest.raises(ItemFailed, match=r"item 0 \(0\) failed: ResultRefused"):
        run_virtual(to_its_end(run))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "item 12 (12) failed: ZeroDivisionError: division by zero"),
        ("WARNING", "14 more items failed, for the same reason as one that is named"),
    ]


class Odd(BaseException):
    """No Exception, and nobody's."""


@pytest.mark.parametrize(
    "raised",
    [
        asyncio.CancelledError(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        KeyError("x"),
        TimeoutError(),
        Odd(),
    ],
)
def test_whatever_a_worker_raises_is_the_failure_of_its_item(raised: BaseException) -> None:
    """A CancelledError that the engine did not cause, and sys.exit() in a library, never end in a short output.

    Whatever it is, it ends nothing but the run: what has finished is committed.
    """
    store = Store()

    async def worker(item: int) -> int:
        if item == 3:
            raise raised
        return item

    with pytest.raises(ItemFailed) as caught:
        run_virtual(to_its_end(Run(worker, IterableSource(range(9)), MemoryLedger(store), Options(concurrency=2))))
    assert caught.value.index == 3
    assert caught.value.__cause__ is raised
    assert store.published is None
    assert store.committed >= {0, 1, 2}
    assert not store.locked


def test_a_keyboard_interrupt_in_a_worker_does_not_wait_for_the_others() -> None:
    """It was meant for the program, whichever item it hit: the others are cancelled, what has finished is kept."""
    store = Store()

    async def worker(item: int) -> int:
        await asyncio.sleep([1.0, 2.0, 1000.0][item])
        if item == 1:
            raise KeyboardInterrupt
        return item

    async def main() -> float:
        run = Run(worker, IterableSource([0, 1, 2]), MemoryLedger(store), Options(concurrency=3, drain_timeout=500))
        with pytest.raises(ItemFailed, match=r"item 1 .*KeyboardInterrupt"):
            await to_its_end(run)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 3
    assert store.committed == {0}


@pytest.mark.parametrize("shrugs", [1, 1_000_000])
def test_a_worker_that_swallows_cancellations_does_not_hold_the_stop(
    shrugs: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop has a bound: what goes on although it was cancelled is left alone and named, the rest is committed.

    One that only swallows the first cancellation is ended by the second.
    """
    store, left = Store(), asyncio.Event()

    async def worker(item: int) -> int:
        cancelled = 0
        while item >= 2 and not left.is_set():
            try:
                await left.wait()
            except asyncio.CancelledError:
                cancelled += 1
                if item == 3 or cancelled > shrugs:
                    await asyncio.sleep(0.5)  # cleans up
                    raise
        return item

    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        run = Run(worker, IterableSource(range(4)), MemoryLedger(store), Options(concurrency=4, drain_timeout=7))
        loop.call_later(1, run.stop)
        before = loop.steps
        with pytest.raises(Stopped):
            await to_its_end(run)
        ended, rounds = loop.time(), loop.steps - before
        left.set()
        await asyncio.sleep(1)
        return ended, rounds

    ended, rounds = run_virtual(main())
    assert ended <= 1 + 7 + 2 * CANCEL_AGAIN_S + 0.1
    assert rounds < 1000, "it must not be cancelled over and over"
    assert store.committed == {0, 1}
    assert not store.locked
    assert ("1 items go on although they were cancelled" in caplog.text) == (shrugs > 1)
    assert ("left alone: [2]" in caplog.text) == (shrugs > 1)


def test_a_worker_task_that_is_cancelled_from_outside_is_an_error() -> None:
    """A worker that finds and cancels its own task, or its neighbours', does not shorten the output."""
    store = Store()

    async def worker(item: int) -> int:
        await asyncio.sleep(1)
        if item == 4:
            for task in asyncio.all_tasks():
                if "_worker_task" in repr(task.get_coro()) and task is not asyncio.current_task():
                    task.cancel()
        return item

    with pytest.raises((ItemFailed, IncompleteRun)):
        run_virtual(to_its_end(Run(worker, IterableSource(range(30)), MemoryLedger(store), Options(concurrency=3))))
    assert store.published is None


def test_a_worker_task_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every worker returned without a word, the run would still know that items are missing."""

    async def ends_at_once(self: Run) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(Pool, "_worker_task", ends_at_once)
    store = Store()
    with pytest.raises(IncompleteRun, match="mark 0"):
        run_virtual(to_its_end(Run(_echo, IterableSource(range(9)), MemoryLedger(store), Options())))
    assert store.published is None


async def _echo(item: Any) -> Any:
    return item


def test_a_result_that_can_not_be_written_fails_its_item() -> None:
    """The cause says what is wrong with the result."""

    async def worker(item: int) -> Any:
        return {"a": {1, 2}} if item == 2 else item

    with pytest.raises(ItemFailed, match="item 2") as caught:
        run_virtual(to_its_end(Run(worker, IterableSource(range(9)), MemoryLedger(Store()), Options(concurrency=1))))
    assert isinstance(caught.value.__cause__, ResultRefused)


def test_everything_behind_a_straggler_is_finished_and_committed() -> None:
    """Item 0 takes 10 s, 19,999 others 20 ms: a handful of commits, and after a crash item 0 alone runs again."""
    world = World(list(range(20_000)), 200, checkpoint_interval=1.0)
    world.latency = lambda index: 10.0 if index == 0 else 0.02

    world.live_for(9)
    assert world.store.committed == set(range(1, 20_000))
    assert len(world.store.commits) <= 6
    run_virtual(world.live())
    assert world.lives[1] == [0]
    world.check_finished()


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_the_window_bounds_how_far_items_run_ahead(window: int) -> None:
    """No item starts at or above durable mark + window, and a small window does not stall the run."""
    world = World(list(range(60)), 8, checkpoint_interval=1000, limits=Limits(window=window))
    inner = world.worker

    async def worker(item: tuple[int, Any]) -> dict[str, Any]:
        assert item[0] < len(world.store.records) + window
        return await inner(item)

    async def timed() -> float:
        await world.live()
        return asyncio.get_running_loop().time()

    world.worker = worker  # type: ignore[method-assign]
    assert run_virtual(timed()) < 90  # the interval of commits is 1,000 s: a full window does not wait for it
    world.check_finished()


def test_a_full_window_behind_a_slow_item_makes_no_storm_of_commits() -> None:
    """With nothing new finished there is nothing to commit, however long the item at the mark takes."""
    world = World(list(range(50)), 4, limits=Limits(window=20), checkpoint_interval=0.1)
    world.latency = lambda index: 500.0 if index == 0 else 0.001
    run_virtual(world.live())
    world.check_finished()
    assert len(world.store.commits) < 12


@pytest.mark.parametrize("bytes_held", [1, 100, 400])
def test_the_byte_bound_never_deadlocks(bytes_held: int) -> None:
    """With any bound on bytes the item at the mark goes out, and what is held stays near the bound."""
    world = World(
        ["x" * 50 for _ in range(60)], 6, checkpoint_interval=1000, limits=Limits(max_buffer_bytes=bytes_held)
    )
    world.latency = lambda index: 5.0 if index % 20 == 0 else 0.01
    held = []
    run = world.run()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.on_step = lambda _: held.append(run._collector.held) if hasattr(run, "_collector") else None
        await to_its_end(run)

    run_virtual(main())
    world.check_finished()
    assert max(held) <= bytes_held + 7 * 75
    assert held[-1] == 0


def test_a_worker_that_never_awaits_holds_no_more_than_the_bound() -> None:
    """Where each item is the one at the mark, the byte bound holds as well: it waits for the commit of those before."""

    async def at_once(item: int) -> str:
        held.append(run._collector.held)
        return "x" * 100

    held: list[int] = []
    options = Options(concurrency=3, limits=Limits(max_buffer_bytes=1000))
    run = Run(at_once, IterableSource(range(500)), MemoryLedger(Store(), delay=100), options)
    assert run_virtual(to_its_end(run)).executed == 500
    assert max(held) < 1000


def test_a_worker_that_never_awaits_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits, signals and the caller's other tasks get their turns all the same, however long a page is."""
    monkeypatch.setattr(sources, "SEQUENCE_PAGE_ITEMS", 10_000)
    done: list[int] = []

    async def at_once(item: int) -> int:
        done.append(item)
        return item

    async def longest_stretch() -> int:
        run = Run(at_once, IterableSource(range(10_000)), MemoryLedger(Store()), Options(concurrency=2))
        running, seen = asyncio.ensure_future(to_its_end(run)), [0]
        while not running.done():
            await asyncio.sleep(0)
            seen.append(len(done))
        return max(after - before for before, after in itertools.pairwise(seen))

    assert run_virtual(longest_stretch()) <= 2 * TURN_ITEMS


def test_what_is_passed_without_new_work_is_committed_too() -> None:
    """The mark may move over items of an earlier run alone, after the last commit: the run still ends complete."""
    world = World([0, 1], 1, checkpoint_interval=0)

    async def slowly() -> AsyncIterator[tuple[int, int]]:
        yield 0, 0
        await asyncio.sleep(50)
        yield 1, 1

    world.latency = lambda index: 100.0 if index == 0 else 0.1
    world.live_for(50, concurrency=2)
    assert set(world.store.ahead) == {1}
    world.store.reborn()
    world.lives.append([])
    world.committed_before.append({1})
    world.latency = lambda index: 0.1
    options = Options(concurrency=1, checkpoint_interval=0)
    run_virtual(to_its_end(Run(world.worker, IterableSource(slowly()), MemoryLedger(world.store), options)))
    world.check_finished()
    assert len(world.store.commits) >= 4


def test_gaps_left_by_a_crash_fill_at_full_concurrency_however_much_is_held() -> None:
    """The byte bound stops only indices above the highest that ever finished."""
    world = World(["x" * 50 for _ in range(35)], 8, checkpoint_interval=0.1)
    world.latency = lambda index: 100.0 if index % 5 == 0 else 0.01

    world.live_for(99)
    assert set(range(35)) - world.store.committed == {0, 5, 10, 15, 20, 25, 30}
    world.latency = lambda index: 10.0

    async def timed() -> float:
        await world.live(limits=Limits(max_buffer_bytes=1))
        return asyncio.get_running_loop().time()

    assert run_virtual(timed()) < 12
    world.check_finished()


def test_above_the_last_gap_the_byte_bound_holds_again() -> None:
    """With the gaps handed out and the buffer full, the item after those that finished earlier has to wait."""
    world = World(["x" * 50 for _ in range(6)], 6, checkpoint_interval=0.1)
    world.latency = lambda index: 1.0 if index in (0, 5) else 0.01

    world.live_for(0.5)
    assert set(world.store.ahead) == {1, 2, 3, 4}
    seen: list[set[int]] = []
    run = world.run(limits=Limits(max_buffer_bytes=1))

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: seen.append(set(world.lives[-1])))
        await to_its_end(run)

    run_virtual(main())
    assert seen == [{0}]
    world.check_finished()


def test_a_batch_size_commits_as_soon_as_so_many_have_finished() -> None:
    """Commits follow the items, not the clock."""
    world = World(list(range(40)), 1, checkpoint_interval=10_000, batch_size=5)
    world.latency = lambda index: 0.3
    run_virtual(world.live())
    assert [len(commit.records) for commit in world.store.commits] == [0] + [5] * 8


def test_commits_go_on_while_workers_do() -> None:
    """A slow disk does not stop the workers: the next commit gathers what finished meanwhile."""
    world = World(list(range(400)), 4, checkpoint_interval=0.05)
    world.latency = lambda index: 0.01
    store = world.store

    async def main() -> float:
        world.lives.append([])
        world.committed_before.append(set())
        ledger = MemoryLedger(store, delay=0.3)
        options = Options(concurrency=4, checkpoint_interval=0.05)
        await to_its_end(Run(world.worker, IterableSource(list(enumerate(world.items))), ledger, options))
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 1.0 + 5 * 0.3
    world.check_finished()


def test_no_items_give_an_empty_output() -> None:
    """An empty input is a job like any other."""
    world = World([], 4)
    summary = run_virtual(world.live())
    assert (summary.total_items, summary.processed, summary.executed) == (0, 0, 0)
    assert world.store.published == []


def test_progress_tells_where_the_run_stands_and_who_holds_the_mark() -> None:
    """Snapshots come with each commit and every two seconds; the straggler is named, with its age."""
    seen: list[Progress] = []
    world = World(list(range(30)), 4, checkpoint_interval=1.0, on_progress=seen.append)
    world.latency = lambda index: 25.0 if index == 3 else 0.1
    run_virtual(world.live())
    late = [progress for progress in seen if 20 < progress.elapsed_s < 24]
    assert late
    assert all((p.held_by, p.mark, p.ahead, p.in_flight, p.finished) == (3, 3, 26, 1, 29) for p in late)
    assert all(p.held_s == pytest.approx(p.elapsed_s, abs=2.1) for p in late)
    assert (seen[-1].finished, seen[-1].held_by, seen[-1].durable_mark) == (30, None, 30)
    marks = [progress.mark for progress in seen]
    assert marks == sorted(marks)


def test_counters_are_right_after_a_resume() -> None:
    """Counts of this run and of all runs are kept apart."""
    world = World(list(range(20)), 2, checkpoint_interval=0.1)

    world.live_for(2)
    mark, done = len(world.store.records), len(world.store.committed)
    assert 0 < mark < 20
    seen: list[Progress] = []
    summary = run_virtual(world.live(on_progress=seen.append))
    assert (summary.resumed_from, summary.executed, summary.total_items, summary.processed) == (mark, 20 - done, 20, 20)
    assert all(p.resumed_from == mark and p.finished == done + p.executed for p in seen)


def test_a_failing_progress_listener_does_not_harm_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged, the run goes on."""

    def fails(progress: Progress) -> None:
        raise RuntimeError("display is gone")

    world = World(list(range(5)), 2, on_progress=fails)
    run_virtual(world.live())
    world.check_finished()
    assert "display is gone" in caplog.text


class FailingLedger(MemoryLedger):
    """Fails at the n-th commit."""

    def __init__(self, store: Store, fail_at: int) -> None:
        super().__init__(store)
        self.left = fail_at

    async def commit(self, commit: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            raise StorageFailed("no room")
        await super().commit(commit)


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_failed_storage_ends_the_run_at_once(fail_at: int, caplog: pytest.LogCaptureFixture) -> None:
    """What is in flight is not waited for, nor called a failure of its items; the next run loses nothing."""
    world = World(list(range(30)), 3, checkpoint_interval=0.2)
    world.latency = lambda index: 500.0 if index == 2 and len(world.lives) == 1 else 0.2

    async def main() -> float:
        run = world.run(drain_timeout=1000.0)
        run._ledger = FailingLedger(world.store, fail_at)
        with pytest.raises(StorageFailed):
            await to_its_end(run)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 10
    assert "CancelledError" not in caplog.text
    run_virtual(world.live())
    world.check_finished()


def test_stop_drains_and_says_that_the_run_can_be_resumed() -> None:
    """`Run.stop` hands out nothing more; the error tells how far the run came."""
    world = World(list(range(50)), 3)
    run = world.run()

    async def main() -> None:
        task = asyncio.ensure_future(run.main())
        await asyncio.sleep(2)
        run.stop()
        with pytest.raises(Stopped, match="run the same line again"):
            await task

    run_virtual(main())
    assert world.store.committed == set(world.lives[0])
    run_virtual(world.live())
    world.check_finished()


class AwayLedger(MemoryLedger):
    """Its storage is away from the third commit on, until somebody is in a hurry."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.hastened_at: list[float] = []
        self._hurry = asyncio.Event()

    def hasten(self) -> None:
        self.hastened_at.append(asyncio.get_running_loop().time())
        self._hurry.set()

    async def commit(self, commit: Any) -> None:
        if commit.generation > 2:
            async with asyncio.timeout(500):
                await self._hurry.wait()
            raise StorageFailed("it is away")
        await super().commit(commit)


@pytest.mark.parametrize(("stops", "ends_at"), [(["stop"], 12), (["stop", "cancel"], 4), (["cancel"], 3)])
def test_a_stop_does_not_wait_for_storage_that_is_away(stops: list[str], ends_at: float) -> None:
    """It is told to make haste once nothing is in flight: at the drain's end, or when all has been cancelled."""
    world = World(list(range(50)), 3)
    world.latency = lambda index: 1000.0 if index == 4 and len(world.lives) == 1 else 0.2

    async def main() -> list[float]:
        run, ledger = world.run(drain_timeout=9.0), AwayLedger(world.store)
        run._ledger = ledger
        task = asyncio.ensure_future(run.main())
        await asyncio.sleep(3)
        for stop in stops:
            getattr(run, stop)()
            await asyncio.sleep(1)
        with pytest.raises(StorageFailed):
            await task
        return ledger.hastened_at

    assert run_virtual(main())[0] == pytest.approx(ends_at, abs=0.1)
    run_virtual(world.live())
    world.check_finished()


def test_a_failure_waits_for_storage_that_is_away() -> None:
    """Nobody has asked for a quick end: what has finished is worth the wait."""

    async def worker(item: int) -> int:
        if item == 20:
            raise ValueError
        await asyncio.sleep(0.2)
        return item

    async def main() -> float:
        ledger = AwayLedger(Store())
        options = Options(concurrency=1, checkpoint_interval=0.5)
        with pytest.raises(ItemFailed):
            await to_its_end(Run(worker, IterableSource(range(30)), ledger, options))
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) > 500


def test_nothing_is_handed_out_that_arrives_after_the_stop() -> None:
    """A page that was on its way when the run was stopped stays where it is, however long the drain takes."""
    started: list[int] = []

    async def items() -> AsyncIterator[int]:
        for index in range(9):
            await asyncio.sleep(1)
            yield index

    async def worker(item: int) -> int:
        started.append(item)
        await asyncio.sleep(1.8)
        return item

    store = Store()
    run = Run(worker, IterableSource(items()), MemoryLedger(store), Options(concurrency=2, drain_timeout=100))

    async def main() -> None:
        task = asyncio.ensure_future(run.main())
        await asyncio.sleep(2.5)
        run.stop()
        with pytest.raises(Stopped):
            await task

    run_virtual(main())
    assert started == [0, 1]
    assert store.committed == {0, 1}


def test_a_source_that_fails_lets_what_it_gave_finish() -> None:
    """The items before the bad line are done and committed; then its error is raised."""

    async def items() -> AsyncIterator[tuple[int, int]]:
        for index in range(10):
            yield index, index
        raise OSError("connection reset")

    world = World(list(range(10)), 2)
    world.lives.append([])
    run = Run(world.worker, IterableSource(items()), MemoryLedger(world.store), Options(concurrency=2))
    with pytest.raises(IncompleteRun, match="connection reset"):
        run_virtual(to_its_end(run))
    assert world.store.committed == set(range(10))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("raised", [asyncio.CancelledError(), SystemExit(3), KeyError("x")])
def test_whatever_a_source_raises_is_its_failure(raised: BaseException, before: int) -> None:
    """Nobody cancelled and nobody stopped: `IncompleteRun` says what it was, and what it gave before is kept."""

    async def items() -> AsyncIterator[int]:
        for index in range(before):
            yield index
        raise raised

    store = Store()
    run = Run(_echo, IterableSource(items()), MemoryLedger(store), Options(concurrency=2))
    with pytest.raises(IncompleteRun, match=f"the source of the items failed: {type(raised).__name__}") as caught:
        run_virtual(to_its_end(run))
    assert caught.value.__cause__ is raised
    assert store.committed == set(range(before))
    assert not store.locked


@pytest.mark.parametrize("before", [0, 3])
def test_a_source_that_swallows_cancellations_does_not_hold_the_stop(
    before: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop has a bound there too: what goes on is left alone and named, and the first error is told."""
    left = asyncio.Event()

    async def items() -> AsyncIterator[int]:
        for index in range(before):
            yield index
        while not left.is_set():
            try:
                await left.wait()
            except asyncio.CancelledError:
                continue

    async def worker(item: int) -> int:
        if item == 2:
            raise ValueError("no such page")
        return item

    async def main() -> float:
        loop = asyncio.get_running_loop()
        run = Run(worker, IterableSource(items()), MemoryLedger(store), Options(concurrency=1, drain_timeout=7))
        loop.call_later(20, run.stop)
        with pytest.raises(ItemFailed if before else Stopped):
            await to_its_end(run)
        ended = loop.time()
        left.set()
        await asyncio.sleep(30)
        return ended

    store = Store()
    assert run_virtual(main()) <= 20 + 7 + 2 * CANCEL_AGAIN_S + 0.1
    assert "the source of the items does not end although it was cancelled" in caplog.text
    assert store.committed == set(range(before - 1 if before else 0))
    assert not store.locked


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize("seed", range(60))
def test_stops_at_any_moment_over_small_pages_keep_every_item_at_its_index(seed: int) -> None:
    """Whatever arrives while a run drains: what is committed is what belongs there, and a resume ends right."""
    dice = random.Random(seed)
    count, size = 30, dice.randint(1, 3)

    class Slowly(IterableSource):
        async def pages(self, position: Any) -> AsyncIterator[Page]:
            async for page in super().pages(position):
                for start in range(0, len(page.items), size):
                    await asyncio.sleep(dice.random() * 0.3)
                    yield Page(None, page.items[start : start + size], page.crcs[start : start + size])

    async def worker(item: int) -> dict[str, int]:
        await asyncio.sleep(dice.expovariate(3))
        if dice.random() < failing:
            raise ValueError("a bad day")
        return {"was": item}

    store = Store()
    for life in range(40):
        failing = 0.05 if life < 20 else 0.0
        store.reborn()
        options = Options(
            concurrency=dice.randint(1, 5),
            limits=Limits(window=dice.randint(1, 12)),
            drain_timeout=dice.random() * 4,
            checkpoint_interval=0.1,
            executor=World.executor(),
        )
        run = Run(worker, Slowly(range(count)), MemoryLedger(store), options)

        async def main(run: Run = run, life: int = life) -> None:
            if life < 20:
                asyncio.get_running_loop().call_later(dice.random() * 3, run.stop)
            await to_its_end(run)

        try:
            run_virtual(main())
        except (Stopped, ItemFailed):
            continue
        break
    assert store.published == [encode_record(index, {"was": index}) for index in range(count)]


def test_a_page_is_never_taken_for_another() -> None:
    """A cursor whose pages and frontier disagree raises: an item never goes out under the index of another."""
    cursor = _cursor_of(0)
    cursor.add(Page(None, ["a", "b"], [1, 2]))
    assert cursor.take() == (0, "a")
    cursor._ready.append((5, ["f"]))
    assert cursor.take() == (1, "b")
    with pytest.raises(RuntimeError, match="the page of index 5 comes before index 2 is out"):
        cursor.take()


def _cursor_of(mark: int) -> Cursor:
    collector = Collector(Watermark(100, mark), batch_items=1, batch_bytes=1)
    return Cursor(collector, Bookmark(None, mark, 0), [], max_buffer_bytes=100, low_water=1, full=lambda: None)


def test_what_is_read_so_far() -> None:
    """Share and items before the last page, whatever the mark; nothing of a source that tells no share."""
    cursor, read = _cursor_of(0), list[Any]()
    for position, first in ((0.0, 0), (0.5, 4), (1.0, 8)):
        cursor.add(Page(position, list(range(first, min(first + 4, 8))), [0] * (4 if first < 8 else 0)))
        read.append(cursor.read_so_far(lambda position: position))
    assert read == [None, (0.5, 4), (1.0, 8)]
    cursor.bookmark(8)
    assert cursor.read_so_far(lambda position: position) == (1.0, 8)
    assert cursor.read_so_far(lambda position: None) is None


def test_items_are_worked_on_as_soon_as_an_async_iterable_gives_them() -> None:
    """An item is not kept waiting for its successors."""
    started: list[float] = []

    async def items() -> AsyncIterator[int]:
        for index in range(3):
            await asyncio.sleep(100)
            yield index

    async def worker(item: int) -> int:
        started.append(asyncio.get_running_loop().time())
        return item

    run_virtual(to_its_end(Run(worker, IterableSource(items()), MemoryLedger(Store()), Options())))
    assert started == [pytest.approx(100), pytest.approx(200), pytest.approx(300)]


def test_a_generator_must_be_given_again_from_its_beginning() -> None:
    """A resume compares what comes by with what was done; another generator is refused before anything runs."""
    world = World(list(range(20)), 2, checkpoint_interval=0.1)

    world.live_for(2)
    assert len(world.store.records) > 2

    def other() -> Iterator[tuple[int, int]]:
        yield from ((index, index + (index == 1)) for index in range(20))

    world.store.reborn()
    world.lives.append([])
    world.committed_before.append(set())
    run = Run(world.worker, IterableSource(other()), MemoryLedger(world.store), Options(concurrency=2))
    with pytest.raises(InputChanged, match="fresh"):
        run_virtual(to_its_end(run))
    assert world.lives[-1] == []
    run_virtual(world.live())
    assert world.store.published is not None


@pytest.mark.parametrize("changed", [None, 0, 700, 1000])
def test_items_without_positions_are_compared_from_the_first_to_the_mark(changed: int | None) -> None:
    """However many pages lie below the mark, one changed item among them refuses the resume; none lets it go on."""
    world = World(list(range(1500)), 1, checkpoint_interval=0.5)
    world.latency = lambda index: 0.01

    world.live_for(14)
    assert 1100 < len(world.store.records) < 1500
    if changed is None:
        run_virtual(world.live())
        world.check_finished()
        return
    world.items[changed] = "another"
    with pytest.raises(InputChanged):
        run_virtual(world.live())
    assert world.lives[1] == []


@pytest.mark.parametrize("change", ["another item", "shorter", "shorter than the mark"])
def test_an_item_that_is_ahead_must_still_be_there(change: str) -> None:
    """What finished ahead of the mark is compared when it comes by, and can not be cut off."""
    world = World(list(range(30)), 2, checkpoint_interval=0.5)
    world.latency = lambda index: 1000.0 if index == 20 else 0.1

    world.live_for(20)
    assert set(world.store.ahead) == set(range(21, 30))
    if change == "another item":
        world.items[25] = "another"
    else:
        del world.items[25 if change == "shorter" else 10 :]
    world.latency = lambda index: 0.1
    with pytest.raises(InputChanged):
        run_virtual(world.live())
    assert world.store.published is None
    world.check_nothing_paid_twice()


class StallingSource:
    """A paged source whose pages never come."""

    kind = "stalling"
    path = None

    def pages(self, position: Any) -> AsyncIterator[Page]:
        async def never() -> AsyncIterator[Page]:
            await asyncio.Event().wait()
            yield Page(None, [], [])

        return never()

    async def check(self, position: Any, *, whole: bool) -> None:
        return

    def share(self, position: Any) -> float | None:
        return None


def test_stopping_has_a_bound_even_while_the_source_stalls() -> None:
    """A stop reaches a run that has not handed out anything yet."""
    source: Source = StallingSource()
    run = Run(_echo, source, MemoryLedger(Store()), Options(drain_timeout=5.0))

    async def main() -> float:
        task = asyncio.ensure_future(to_its_end(run))
        await asyncio.sleep(50)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) <= 55.1


def test_the_virtual_loop_sees_a_hang() -> None:
    """The clock of these tests is honest: a program that waits for ever is an error, not a pass."""
    with pytest.raises(Hang):
        run_virtual(asyncio.Event().wait())


class SlowlyCompared(IterableSource):
    """What lies before a position takes an hour to compare."""

    async def check(self, position: Any, *, whole: bool) -> None:
        if whole:
            await asyncio.sleep(3600)


@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_does_not_wait_for_the_comparison_of_what_was_there(*, keep: bool) -> None:
    """Neither when all is done but the audit, nor when a complete job that was kept is only compared."""
    world = World(list(range(6)), 2, checkpoint_interval=0.1)
    if keep:
        run = Run(world.worker, IterableSource([]), MemoryLedger(world.store, keep_checkpoint=True), Options())
        run_virtual(to_its_end(run))
    else:
        world.live_for(1.0)
    world.store.reborn()
    world.lives.append([])
    items = [] if keep else list(enumerate(world.items))
    again = Run(world.worker, SlowlyCompared(items), MemoryLedger(world.store, keep_checkpoint=keep), Options())

    async def main() -> float:
        task = asyncio.ensure_future(again.main())
        await asyncio.sleep(600)
        assert keep or len(world.store.records) == 6
        again.stop()
        with pytest.raises(Stopped):
            await task
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) < 601
    assert world.store.published == ([] if keep else None)
    assert not world.store.locked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("concurrency", -1),
        ("concurrency", 2.5),
        ("concurrency", 10**20),
        ("concurrency", True),
        ("batch_size", 0),
        ("batch_size", "5"),
        ("checkpoint_interval", -0.1),
        ("checkpoint_interval", float("nan")),
        ("drain_timeout", -1),
        ("limits", Limits(window=0)),
        ("limits", Limits(max_buffer_bytes=0)),
        ("limits", None),
        ("on_error", "ignore"),
        ("version", 5),
        ("on_progress", "print"),
        ("on_progress", asyncio.sleep),
    ],
)
def test_a_value_that_can_not_be_used_is_refused(name: str, value: Any) -> None:
    """Each with a message that names it."""
    with pytest.raises(UsageError, match="limits|window|max_buffer_bytes" if name == "limits" else name):
        Options(**{name: value}).check()
