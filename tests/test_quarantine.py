"""An item that kills the process: it is found, the others are done, and nobody else is blamed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from async_recovery import ItemFailed, IterableSource, Limits, Retry, SlowDown
from async_recovery.checkpoint import Spent
from async_recovery.engine import Run, to_its_end
from async_recovery.options import Options
from async_recovery.quarantine import Quarantine

from .support.memory_ledger import MemoryLedger, Store
from .support.virtual_loop import run_virtual

HANGS_AFTER_S = 5_000.0


class Deadly:
    """A job with items that end the process.

    :ivar started: what each life started, in order.
    """

    def __init__(
        self, count: int, kills: Callable[[int], bool], latency: Callable[[int], float] = lambda _: 1.0
    ) -> None:
        self.count, self.kills, self.latency = count, kills, latency
        self.store = Store()
        self.started: list[list[int]] = []

    async def worker(self, item: int) -> int:
        if self.store.dead:
            await asyncio.sleep(10**6)
        self.started[-1].append(item)
        await asyncio.sleep(self.latency(item))
        if self.kills(item) and not self.store.dead:
            self.store.dead = True
            self.died.set()
            await asyncio.sleep(10**6)
        return item

    def live(self, **options: Any) -> bool:
        """One life; whether it came to an end of its own."""
        self.store.reborn()
        self.started.append([])

        async def main() -> None:
            self.died = asyncio.Event()
            chosen = {"concurrency": 4, "checkpoint_interval": 0.2, "drain_timeout": 0.0, **options}
            run = Run(self.worker, IterableSource(range(self.count)), MemoryLedger(self.store), Options(**chosen))
            running = asyncio.ensure_future(to_its_end(run))
            died = asyncio.ensure_future(self.died.wait())
            await asyncio.wait({running, died}, return_when=asyncio.FIRST_COMPLETED, timeout=HANGS_AFTER_S)
            assert running.done() or died.done(), "it hangs"
            died.cancel()
            if not running.done():
                running.cancel()
                run.cancel()
                await asyncio.wait({running})
            elif not running.cancelled():
                running.result()

        run_virtual(main())
        return not self.store.dead


RETRY = Retry(quarantine_after=3, attempts=1)


@pytest.mark.parametrize("killer", [0, 7, 29])
@pytest.mark.parametrize("latency", [1.0, 0.0])
def test_an_item_that_kills_the_process_becomes_a_recorded_failure(killer: int, latency: float) -> None:
    """After a few restarts everything else is done, and no other item is blamed."""
    job = Deadly(30, lambda item: item == killer, lambda item: latency * (1 + item % 3))
    lives = 1
    while not job.live(retry=RETRY, on_error="record"):
        lives += 1
        assert lives < 8
    assert lives == 5
    assert job.store.published is not None
    failed = [line for line in job.store.published if b'"error"' in line]
    message = b'{"type":"Quarantined","message":"deaths of the process while this item ran: 3"}'
    assert failed == [b'{"index":%d,"error":%b,"item":%d}' % (killer, message, killer)]
    assert [killer in life for life in job.started] == [True] * 4 + [False]
    assert job.started[3][-1] == killer, "it was not alone when the last death was counted"


def test_several_of_them_are_found_one_after_the_other() -> None:
    """However they lie."""
    bad = {3, 4, 20}
    job, lives = Deadly(40, lambda item: item in bad), 1
    while not job.live(retry=RETRY, on_error="record"):
        lives += 1
        assert lives < 30
    assert job.store.published is not None
    assert {i for i, line in enumerate(job.store.published) if b"Quarantined" in line} == bad


def test_under_stop_the_message_names_it_and_a_mended_job_goes_on() -> None:
    """The item starts again then, with its deaths forgotten."""
    deadly = {7}
    job = Deadly(20, lambda item: item in deadly)
    for _ in range(4):
        assert not job.live(retry=RETRY)
    with pytest.raises(
        ItemFailed, match=r"item 7 \(7\) failed: Quarantined: deaths of the process while this item ran: 3"
    ):
        job.live(retry=RETRY)
    deadly.clear()
    assert job.live(retry=RETRY)
    assert job.store.published == [b'{"index":%d,"result":%d}' % (i, i) for i in range(20)]


def test_without_it_nothing_is_named_and_nothing_given_up() -> None:
    """It is off by default: each life starts the item again, and the journal says nothing of starts."""
    job = Deadly(20, lambda item: item == 7)
    for _ in range(6):
        assert not job.live(retry=Retry(attempts=2), on_error="record")
    assert all(7 in life for life in job.started)
    assert all(not commit.spent and not commit.ended for commit in job.store.commits)


def test_only_items_that_were_named_and_durable_have_started() -> None:
    """After an unclean end, a start that is not in the journal does not happen, up to the old admission limit."""
    job = Deadly(60, lambda item: item == 5)
    assert not job.live(retry=RETRY, limits=Limits(window=24), on_error="record")
    assert job.store.state is not None
    limit = job.store.state.mark + 24
    before = len(job.store.commits)
    assert not job.live(retry=RETRY, limits=Limits(window=24), on_error="record")
    named = {item.index for commit in job.store.commits[before:] for item in commit.spent if item.starts}
    assert {index for index in job.started[1] if index < limit} <= named
    assert job.store.spent[5] == Spent(5, 0, 1)


def test_a_stop_in_order_suspects_nobody() -> None:
    """What was in flight then was not killed by its item: its start is taken back, and the next life names nothing."""
    job = Deadly(40, lambda item: item == 9 and len(job.started) == 1, lambda item: 3.0)
    assert not job.live(retry=RETRY)

    async def stopped() -> None:
        options = Options(concurrency=4, retry=RETRY, drain_timeout=0.0, checkpoint_interval=0.2)
        run = Run(job.worker, IterableSource(range(40)), MemoryLedger(job.store), options)
        running = asyncio.ensure_future(to_its_end(run))
        await asyncio.sleep(7)
        run.stop()
        await asyncio.wait({running})
        assert running.exception() is not None

    job.store.reborn()
    job.started.append([])
    run_virtual(stopped())
    assert job.store.state is not None
    assert job.store.state.ended
    assert job.store.spent == {}
    before = len(job.store.commits)
    assert job.live(retry=RETRY)
    assert not any(commit.spent for commit in job.store.commits[before:])


def test_items_in_flight_beside_a_killer_are_not_given_up_with_it() -> None:
    """However often they were there: before the last death they are started alone, and live through it."""
    job, lives = Deadly(12, lambda item: item == 0, lambda item: 0.5 if item == 0 else 400.0), 1
    while not job.live(retry=RETRY, on_error="record", concurrency=12):
        lives += 1
        assert lives < 20
    assert job.store.published is not None
    assert sum(b"Quarantined" in line for line in job.store.published) == 1


def test_the_first_death_may_be_enough() -> None:
    """`quarantine_after=1`: whatever may have killed it starts alone."""
    job, lives = Deadly(10, lambda item: item == 6), 1
    while not job.live(retry=Retry(quarantine_after=1), on_error="record"):
        lives += 1
        assert lives < 5
    assert lives == 3
    assert job.store.published is not None
    assert b"deaths of the process while this item ran: 1" in job.store.published[6]


def test_nothing_starts_beside_one_that_runs_alone() -> None:
    """Nor before its name is durable."""
    items = iter([(index, f"item {index}") for index in range(6)])
    quarantine = Quarantine(4, 2, {1: 1}, group=2)

    def take() -> tuple[int, str] | None:
        return next(items, None)

    assert quarantine.next(take) is None
    assert quarantine.to_name == [0, 2]
    quarantine.naming()
    assert quarantine.next(take) is None
    quarantine.named()
    assert [quarantine.next(take), quarantine.next(take)] == [(0, "item 0"), (2, "item 2")]
    assert quarantine.next(take) is None
    assert quarantine.to_name == [3]
    quarantine.naming()
    quarantine.named()
    assert quarantine.next(take) == (3, "item 3")
    assert quarantine.next(take) is None, "one that is to run alone waits for the others"
    for index in (0, 2, 3):
        quarantine.ended(index)
    assert quarantine.next(take) is None
    assert quarantine.to_name == [1]
    assert quarantine.starts[1] == 2
    quarantine.naming()
    quarantine.named()
    assert quarantine.next(take) == (1, "item 1")
    assert quarantine.holds_all
    assert quarantine.next(take) is None
    quarantine.ended(1)
    assert quarantine.next(take) == (4, "item 4")
    assert quarantine.is_over


@pytest.mark.parametrize("error", [ConnectionError("first try"), SlowDown(0.5)])
def test_an_item_that_waits_for_its_next_attempt_is_not_blamed_for_a_death(error: Exception) -> None:
    """It was not running then; and its next start is named like the first."""
    job = Deadly(10, lambda item: item == 7, lambda item: 0.05)
    real, tried = job.worker, set[tuple[int, int]]()

    async def worker(item: int) -> int:
        if item == 5 and (len(job.started), item) not in tried:
            tried.add((len(job.started), item))
            raise error
        return await real(item)

    job.worker = worker  # type: ignore[method-assign]
    lives = 1
    while not job.live(retry=Retry(quarantine_after=3, attempts=5, initial=1), on_error="record", concurrency=10):
        lives += 1
        assert lives < 12
    assert job.store.published is not None
    assert [i for i, line in enumerate(job.store.published) if b"Quarantined" in line] == [7]


def test_an_item_that_kills_at_a_later_attempt_is_found() -> None:
    """Each start of a suspected item is named, not only the first of a life."""
    job = Deadly(10, lambda item: item == 7, lambda item: 0.05)
    real, tried = job.worker, set[int]()

    async def worker(item: int) -> int:
        if item == 7 and len(job.started) not in tried:
            tried.add(len(job.started))
            raise ConnectionError("first try")
        return await real(item)

    job.worker = worker  # type: ignore[method-assign]
    lives = 1
    while not job.live(retry=Retry(quarantine_after=3, attempts=50, initial=0.1, breaker=None), on_error="record"):
        lives += 1
        assert lives < 12
    assert job.store.published is not None
    assert [i for i, line in enumerate(job.store.published) if b"Quarantined" in line] == [7]
