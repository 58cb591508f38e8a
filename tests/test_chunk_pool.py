"""The pool of a cluster in virtual time: processes that die, hang, come and go; every decision as ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from itertools import pairwise
from math import inf
from typing import Any

import pytest

from async_recovery import (
    ItemFailed,
    IterableSource,
    Limits,
    NoWorkers,
    Progress,
    RateLimit,
    Record,
    Retry,
    RunSummary,
    SlowDown,
    Stopped,
    chunk_pool,
)
from async_recovery.engine import Run, to_its_end
from async_recovery.errors import CommandFailed
from async_recovery.options import Options
from async_recovery.records import encode_record, read_failure

from .support.fake_cluster import FakeCluster, note
from .support.memory_ledger import MemoryLedger, Store
from .support.virtual_loop import VirtualLoop, run_virtual
from .test_quarantine import Deadly

Worker = Callable[[Any], Awaitable[Any]]


def at_most(number: int, began: list[float]) -> bool:
    """Whether so many began in any second, up to the resolution of the rate; in the order in which they did."""
    return all(later - earlier >= 1.0 - 0.011 for earlier, later in zip(began, began[number:], strict=False))


class Job:
    """A job on a cluster: items are the numbers below `count`.

    :ivar seen: every snapshot of its progress.
    """

    def __init__(self, cluster: FakeCluster, worker: Worker, count: int, **options: Any) -> None:
        self.cluster, self.count = cluster, count
        self.store = Store()
        self.seen: list[Progress] = []
        chosen: dict[str, Any] = {"concurrency": 8, "checkpoint_interval": 0.5, "on_progress": self.seen.append}
        chosen.update(options)
        self.ran = Run(
            worker, IterableSource(range(count)), MemoryLedger(self.store), Options(executor=cluster, **chosen)
        )

    def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> RunSummary:
        """To its end, in virtual time."""

        async def main() -> RunSummary:
            other = None if beside is None else asyncio.ensure_future(beside())
            try:
                return await to_its_end(self.ran)
            finally:
                if other is not None:
                    other.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await other

        return run_virtual(main())

    def check_output(self, *failed: int) -> None:
        """It is that of an undisturbed run; and no more of it has failed than that."""
        assert self.store.published is not None
        for index, record in enumerate(self.store.published):
            if index in failed:
                assert read_failure(record), record
            else:
                assert record == encode_record(index, index * index)
        assert len(self.store.published) == self.count


def working(seconds: float | Callable[[int], float]) -> Worker:
    """A worker that takes so long."""

    async def worker(item: int) -> int:
        note(item)
        await asyncio.sleep(seconds(item) if callable(seconds) else seconds)
        return item * item

    return worker


def test_each_item_runs_once_under_the_share_of_its_process() -> None:
    """With nobody dying, no item runs twice, and never more than the concurrency at once."""
    cluster, running = FakeCluster(3), [0, 0]

    async def worker(item: int) -> int:
        seat = note(item)
        seat.running += 1
        seat.most_running = max(seat.most_running, seat.running)
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.1)
        seat.running -= 1
        running[0] -= 1
        return item * item

    job = Job(cluster, worker, 500, concurrency=10)
    assert job.run().executed == 500
    job.check_output()
    assert set(cluster.runs.values()) == {1}
    assert running[1] == 10
    assert sorted(seat.most_running for seat in cluster.all_seats) == [3, 3, 4]


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.02, 0.06, 0.5])
def test_one_that_joins_a_moment_later_runs_none_too_many(after_s: float) -> None:
    """The first has been given all places, and says nothing of it yet: none is given twice."""
    cluster, running = FakeCluster(1, says_after_s=0.05), [0, 0]

    async def worker(item: int) -> int:
        note(item)
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(5.0)
        running[0] -= 1
        return item * item

    job = Job(cluster, worker, 60, concurrency=10)

    async def beside() -> None:
        while not cluster.seats:  # noqa: ASYNC110  a moment, on a clock of its own
            await asyncio.sleep(0.0005)
        await asyncio.sleep(after_s)
        cluster.add()

    job.run(beside)
    job.check_output()
    assert running[1] == 10
    assert len(cluster.all_seats[1].began) >= 20


def test_chunks_hold_about_a_second_of_work() -> None:
    """Of quick items as many as there may be; of slow ones one by one, so that none waits where it is not needed."""
    quick = FakeCluster(1)
    Job(quick, working(0.001), 20_000, concurrency=64).run()
    assert 500 <= max(quick.all_seats[0].chunks) <= 1_000
    assert len(quick.all_seats[0].chunks) < 200
    middling = FakeCluster(1)
    Job(middling, working(0.2), 2_000, concurrency=40).run()
    assert 100 <= max(middling.all_seats[0].chunks) <= 250, "200 a second"
    slow = FakeCluster(1)
    Job(slow, working(60.0), 40, concurrency=4).run()
    assert set(slow.all_seats[0].chunks[1:]) <= {1, 2, 3, 4}


def test_a_slow_item_holds_none_of_its_chunk() -> None:
    """Its neighbours are committed while it runs, what had not begun behind it goes elsewhere; the mark names it."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(lambda item: 300.0 if item in (7, 8, 9, 10) else 0.01), 3_000)
    job.run()
    job.check_output()
    early = [seen for seen in job.seen if seen.elapsed_s < 30]
    assert max(seen.finished for seen in early) == 2_996
    assert early[-1].held_by == 7


def test_what_waits_in_a_process_that_stands_still_goes_elsewhere() -> None:
    """All that may run in a quick process gets stuck: the chunk behind it is done by another within seconds."""
    cluster = FakeCluster(2)

    async def worker(item: int) -> int:
        seat = note(item)
        is_stuck = seat.name == "seat-1" and asyncio.get_running_loop().time() > 2
        await asyncio.sleep(300.0 if is_stuck else 0.01)
        return item * item

    job = Job(cluster, worker, 3_000)
    job.run()
    job.check_output()
    assert max(seen.finished for seen in job.seen if seen.elapsed_s < 30) == 3_000 - 4
    assert set(cluster.runs.values()) == {1}


def test_a_process_that_joins_in_the_middle_takes_part() -> None:
    """It gets its share of what is left, and no more runs at once than before."""
    cluster, running = FakeCluster(1), [0, 0]

    async def worker(item: int) -> int:
        note(item)
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.05 + item % 7 * 0.1)
        running[0] -= 1
        return item * item

    job = Job(cluster, worker, 400, concurrency=4)

    async def beside() -> None:
        await asyncio.sleep(3)
        cluster.add()

    job.run(beside)
    job.check_output()
    assert set(cluster.runs.values()) == {1}
    assert len(cluster.all_seats[1].began) > 100
    assert running[1] == 4


def test_a_long_quiet_is_no_silence() -> None:
    """Nothing is said in it but that the run is there: no process takes itself for cut off."""
    cluster = FakeCluster(2, lease_s=2.5)
    job = Job(cluster, working(20.0), 40, concurrency=8)
    job.run()
    job.check_output()
    assert [seat.times_held for seat in cluster.all_seats] == [0, 0]


def test_what_a_dead_process_had_runs_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost, and only what was in flight there runs twice; for one death, nothing is suspected."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(0.2), 200)

    async def beside() -> None:
        await asyncio.sleep(2.05)
        cluster.all_seats[0].die()

    job.run(beside)
    job.check_output()
    assert sum(runs - 1 for runs in cluster.runs.values()) <= 8, "its share, and what was on its way"
    assert "run apart" not in caplog.text


def test_a_silent_process_loses_its_lease_and_the_first_result_counts() -> None:
    """What it had runs elsewhere; when it wakes, its late results change nothing, and it works again."""
    cluster = FakeCluster(2, lease_s=3.0)
    job = Job(cluster, working(0.2), 600)

    async def beside() -> None:
        await asyncio.sleep(1.05)
        cluster.all_seats[0].fall_silent()
        await asyncio.sleep(6)
        assert [seen.state for seen in job.seen[-1].workers] == ["is silent", "works"]
        began = len(cluster.all_seats[0].began)
        cluster.all_seats[0].wake()
        await asyncio.sleep(3)
        assert len(cluster.all_seats[0].began) > began + 10

    job.run(beside)
    job.check_output()
    assert len(job.store.commits) > 5


def test_a_late_result_counts_where_the_item_is_still_under_way() -> None:
    """The second result of it is dropped: nothing is finished twice."""
    cluster = FakeCluster(2, lease_s=1.0)
    tries: list[str] = []

    async def worker(item: int) -> int:
        seat = note(item)
        if item == 5:
            tries.append(seat.name)
            if len(tries) == 1:
                seat.fall_silent()
                asyncio.get_running_loop().call_later(4.0, seat.wake)
                await asyncio.sleep(3.0)
            else:
                await asyncio.sleep(100.0)
        return item * item

    job = Job(cluster, worker, 100)
    assert job.run().elapsed_s < 110
    job.check_output()
    assert len(tries) == 2
    assert job.seen[-1].finished == 100


def test_a_late_result_counts_where_the_item_waits_to_be_given_out_again() -> None:
    """It is not given out again then."""
    cluster = FakeCluster(2, lease_s=1.0)
    job = Job(cluster, working(1.5), 60)

    async def beside() -> None:
        await asyncio.sleep(2.0)
        job.ran.pause()
        cluster.all_seats[0].fall_silent()
        await asyncio.sleep(6.0)
        assert len(job.ran._admission.waiting) >= 4, "its lease is over"
        cluster.all_seats[0].wake()
        await asyncio.sleep(2.0)
        job.ran.unpause()

    job.run(beside)
    job.check_output()
    assert set(cluster.runs.values()) == {1}


@pytest.mark.parametrize("on_error", ["record", "stop"])
def test_the_item_that_kills_its_process_is_found(on_error: str) -> None:
    """It alone fails, in the words of each run; all that ran beside it is done."""
    cluster = FakeCluster(2, restarts=True)

    async def worker(item: int) -> int:
        note(item)
        if item == 137:
            await asyncio.sleep(0.01)
            cluster.kill_here()
            await asyncio.sleep(1)
        await asyncio.sleep(0.05)
        return item * item

    job = Job(cluster, worker, 2_000, concurrency=64, on_error=on_error, retry=3)
    if on_error == "record":
        assert job.run().failed == 1
        job.check_output(137)
    else:
        with pytest.raises(ItemFailed, match=r"item 137 .*Quarantined: the worker process died, or hung, each time"):
            job.run()
    assert cluster.deaths < 15


def test_an_item_that_hangs_its_process_is_found() -> None:
    """One that blocks the loop of each process it runs in costs a lease each time, and then fails."""
    cluster = FakeCluster(2, lease_s=2.0)

    async def worker(item: int) -> int:
        seat = note(item)
        if item == 40:
            seat.fall_silent()
            asyncio.get_running_loop().call_later(1.0, cluster.add)
            await asyncio.sleep(10_000)
        await asyncio.sleep(0.05)
        return item * item

    job = Job(cluster, worker, 300, on_error="record")
    assert job.run().failed == 1
    job.check_output(40)
    assert len(cluster.all_seats) < 12


def test_processes_killed_from_outside_fail_no_item() -> None:
    """Kill after kill, whatever runs there at that moment: nothing is taken for a killer."""
    cluster = FakeCluster(3, restarts=True)
    job = Job(cluster, working(0.3), 300, concurrency=12)

    async def beside() -> None:
        while True:
            await asyncio.sleep(0.9)
            if cluster.seats:
                next(iter(cluster.seats.values())).die()
                cluster.add()

    assert job.run(beside).failed == 0
    job.check_output()


@pytest.mark.parametrize("deaths", [0, 2])
def test_processes_that_leave_in_order_fail_no_item(deaths: int) -> None:
    """However often, and also while an item is tested apart, since processes died with it."""
    cluster = FakeCluster(1)
    job = Job(cluster, working(20.0), 1, on_error="record")

    async def beside() -> None:
        for leaves in range(8):
            await asyncio.sleep(1.0)
            cluster.all_seats[-1].die(in_order=leaves >= deaths)
            cluster.add()

    assert job.run(beside).failed == 0
    job.check_output()
    assert cluster.runs[0] == 9


def test_without_workers_the_run_pauses_and_ends_resumable() -> None:
    """It says why it stands still, and ends with the code that says: try again."""
    cluster = FakeCluster(2, patience_s=10.0)
    job = Job(cluster, working(0.2), 500)

    async def beside() -> None:
        await asyncio.sleep(3)
        for seat in list(cluster.seats.values()):
            seat.die()

    with pytest.raises(
        NoWorkers, match=r"no worker of the cluster was there for 10 s.*run the same line again"
    ) as failed:
        job.run(beside)
    assert failed.value.exit_code == 75
    assert any(seen.paused and "no worker of the cluster" in seen.paused for seen in job.seen)
    done = len(job.store.committed)
    assert 80 <= done < 500
    again = FakeCluster(1)
    job.store.reborn()
    rest = Job(again, working(0.2), 500)
    rest.store = job.store
    rest.ran = Run(
        working(0.2), IterableSource(range(500)), MemoryLedger(job.store), Options(executor=again, concurrency=8)
    )
    assert job.ran.job == rest.ran.job
    assert rest.run().executed == 500 - done
    rest.check_output()


def test_a_coordinator_that_stood_still_takes_nobody_for_silent(caplog: pytest.LogCaptureFixture) -> None:
    """It was stopped, or its machine slept, for longer than lease and patience: no item runs twice."""
    cluster = FakeCluster(2, lease_s=5.0, patience_s=5.0)
    job = Job(cluster, working(0.2), 400)

    async def beside() -> None:
        await asyncio.sleep(2.05)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.now += 100.0

    job.run(beside)
    job.check_output()
    assert set(cluster.runs.values()) == {1}
    assert "this process stood still for 100 s" in caplog.text


def test_a_coordinator_that_stood_still_without_workers_waits_for_them() -> None:
    """All of its patience begins anew."""
    cluster = FakeCluster(1, patience_s=5.0)
    job = Job(cluster, working(0.2), 100)

    async def beside() -> None:
        await asyncio.sleep(1.05)
        cluster.all_seats[0].die()
        await asyncio.sleep(1.0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.now += 100.0
        await asyncio.sleep(4.0)
        cluster.add()

    job.run(beside)
    job.check_output()


def test_workers_that_come_back_in_time_end_the_pause() -> None:
    """The run goes on as if nothing had been."""
    cluster = FakeCluster(2, patience_s=10.0)
    job = Job(cluster, working(0.2), 200)

    async def beside() -> None:
        await asyncio.sleep(1)
        for seat in list(cluster.seats.values()):
            seat.die()
        await asyncio.sleep(8)
        cluster.add()

    job.run(beside)
    job.check_output()


def test_a_slow_down_in_one_process_pauses_all() -> None:
    """Within the way of the bytes, nothing begins anywhere until it is over; the item comes again."""
    cluster = FakeCluster(3)
    began: list[float] = []
    asked: list[float] = []

    async def worker(item: int) -> int:
        note(item)
        now = asyncio.get_running_loop().time()
        began.append(now)
        if item == 300 and not asked:
            asked.append(now)
            raise SlowDown(5)
        await asyncio.sleep(0.01)
        return item * item

    job = Job(cluster, worker, 2_000, concurrency=6)
    job.run()
    job.check_output()
    late = [moment for moment in began if asked[0] + 0.05 < moment < asked[0] + 5]
    assert late == []
    assert set(cluster.runs.values()) == {1, 2}


def test_a_pause_by_hand_holds_back_what_waits_in_processes() -> None:
    """Also what has been sent there, and has not begun."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(0.1), 400)

    async def beside() -> None:
        await asyncio.sleep(2)
        job.ran.pause()
        await asyncio.sleep(1)
        begun = sum(cluster.runs.values())
        await asyncio.sleep(20)
        assert sum(cluster.runs.values()) == begun
        job.ran.unpause()

    assert job.run(beside).elapsed_s > 20
    job.check_output()
    assert set(cluster.runs.values()) == {1}


@pytest.mark.parametrize("seconds", [0.001, 3.0])
def test_a_rate_limit_holds_for_the_whole_run(seconds: float) -> None:
    """In no second more begin than it allows, over all processes, and no fewer than it allows."""
    cluster = FakeCluster(3)
    began: list[float] = []

    async def worker(item: int) -> int:
        note(item)
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(seconds)
        return item * item

    job = Job(cluster, worker, 200, concurrency=90, rate_limit=RateLimit(per_second=20))
    summary = job.run()
    job.check_output()
    assert at_most(20, began)
    assert summary.elapsed_s < 10.0 * 1.25 + 2 * seconds


def test_a_rate_limit_can_be_set_on_the_way() -> None:
    """What waits in the processes comes back, and no more begin in a second; without it, as many as before."""
    cluster = FakeCluster(2)
    began: list[float] = []

    async def worker(item: int) -> int:
        note(item)
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.05)
        return item * item

    job = Job(cluster, worker, 1_500, concurrency=10)

    async def beside() -> None:
        await asyncio.sleep(2)
        job.ran.set_rate(10)
        await asyncio.sleep(10)
        job.ran.set_rate(None)

    job.run(beside)
    job.check_output()
    limited = [moment for moment in began if 2.05 < moment < 12]
    assert 80 <= len(limited) <= 101
    assert at_most(10, limited)
    assert len([moment for moment in began if moment > 12.5]) > 1_000 - 110
    assert set(cluster.runs.values()) == {1}


@pytest.mark.parametrize("limit", [None, RateLimit(per_second=1_000)])
def test_under_a_rate_limit_nothing_is_sent_ahead(limit: RateLimit | None) -> None:
    """A process has no more than runs there: what waits behind others would keep its place in the limit meanwhile."""
    job = Job(FakeCluster(2), working(0.05), 400, concurrency=4, rate_limit=limit)
    job.run()
    job.check_output()
    most = max(seat.in_flight for progress in job.seen for seat in progress.workers)
    assert most == 2 if limit else most > 10


def test_results_that_come_late_leave_a_rate_limit_open() -> None:
    """What one process finished late, another had been given, and has not begun: nothing waits for that to begin."""
    cluster = FakeCluster(2, lease_s=2.0)
    job = Job(cluster, working(3.0), 900, concurrency=100, rate_limit=RateLimit(per_second=30))

    async def beside() -> None:
        await asyncio.sleep(6.0)
        one, other = cluster.all_seats
        for act, pause in ((one.fall_silent, 1.8), (other.fall_silent, 1.2), (one.wake, 0.6), (other.wake, 0.0)):
            act()
            await asyncio.sleep(pause)

    assert job.run(beside).elapsed_s < 900 / 30 * 1.5
    job.check_output()


@pytest.mark.parametrize("silent_s", [1.5, 4.0])
def test_a_silent_process_begins_nothing_that_the_rate_forgot(silent_s: float) -> None:
    """Heard again before or after its lease is over: what was on its way there is not begun on top of the rest."""
    cluster = FakeCluster(2, lease_s=2.5)
    began: list[float] = []

    async def worker(item: int) -> int:
        note(item)
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        return item * item

    job = Job(cluster, worker, 1_500, concurrency=30, rate_limit=RateLimit(per_second=100))

    async def beside() -> None:
        await asyncio.sleep(3.05)
        cluster.all_seats[0].fall_silent()
        await asyncio.sleep(silent_s)
        cluster.all_seats[0].wake()

    job.run(beside)
    job.check_output()
    began.sort()
    assert at_most(100, began)


async def _steer(job: Job, how: str, held: list[float]) -> None:
    """Once suspects run apart, nothing may begin for ten seconds."""
    while not any(seat.state == "is tested" and seat.in_flight for seat in job.ran.progress().workers):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    if how == "pause":
        job.ran.pause()
    now = asyncio.get_running_loop().time()
    held += [now, now + 10]
    await asyncio.sleep(10)
    job.ran.unpause()


@pytest.mark.parametrize("how", ["pause", "slow down", "rate"])
def test_what_holds_back_all_holds_back_suspects(how: str) -> None:
    """Items that run apart are paused, slowed down and counted as all others are; the killer is found all the same."""
    cluster = FakeCluster(2, restarts=True)
    began, held = list[float](), list[float]()

    async def worker(item: int) -> int:
        note(item)
        now = asyncio.get_running_loop().time()
        began.append(now)
        if how == "slow down" and held and held[0] < now < held[0] + 3:
            held[0] = inf  # once
            raise SlowDown(5)
        if item == 137:
            await asyncio.sleep(0.05)
            cluster.kill_here()
            await asyncio.sleep(1)
        await asyncio.sleep(0.1)
        return item * item

    rate = RateLimit(per_second=20, burst=20) if how == "rate" else None
    job = Job(cluster, worker, 400, concurrency=8, on_error="record", rate_limit=rate)
    job.run(lambda: _steer(job, how, held))
    job.check_output(137)
    assert held, "suspects ran apart"
    if how == "pause":
        assert not [moment for moment in began if held[0] + 0.05 < moment < held[1]]
    elif how == "rate":
        assert at_most(20, began)
    else:
        assert held[0] == inf
        gaps = [later - earlier for earlier, later in pairwise(began)]
        assert max(gaps) > 4.5, "five seconds in which nothing begins"


@pytest.mark.parametrize("limit", [None, RateLimit(per_second=10)])
def test_an_outage_while_suspects_run_apart_in_the_only_process_ends(limit: RateLimit | None) -> None:
    """Neither do they wait for its end for ever, nor the probe for theirs."""
    cluster = FakeCluster(1, restarts=True)

    async def worker(item: int) -> int:
        note(item)
        await asyncio.sleep(0.05)
        if item == 37:
            cluster.kill_here()
            await asyncio.sleep(1)
        if 2 < asyncio.get_running_loop().time() < 20:
            raise ConnectionError("the service is away")
        return item * item

    retry = Retry(attempts=3, breaker=3, initial=0.5, maximum=4.0)
    job = Job(cluster, worker, 200, on_error="record", retry=retry, rate_limit=limit)

    async def beside() -> None:
        await asyncio.sleep(300)
        job.ran.stop()

    job.run(beside)
    job.check_output(37)


def test_the_bytes_of_items_in_a_process_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large items go there a few at a time, whatever the concurrency; one goes in any case."""
    monkeypatch.setattr(chunk_pool, "MOST_BYTES", 20_000)
    monkeypatch.setattr(chunk_pool, "SEAT_BYTES", 50_000)
    cluster, seen = FakeCluster(2), list[Progress]()

    async def worker(item: str) -> int:
        note(item)
        await asyncio.sleep(0.1)
        return len(item)

    items = ["x" * (10_000 if number < 100 else 100_000) for number in range(110)]
    options = Options(executor=cluster, concurrency=100, checkpoint_interval=0.05, on_progress=seen.append)
    summary = run_virtual(to_its_end(Run(worker, IterableSource(items), MemoryLedger(Store()), options)))
    assert summary.executed == 110
    most = max(seat.in_flight for progress in seen for seat in progress.workers)
    assert 4 <= most <= 7


def test_retries_are_those_of_the_run() -> None:
    """An item that fails is tried again wherever there is room, as often as the policy says, and then is recorded."""
    cluster = FakeCluster(2)

    async def worker(item: int) -> int:
        note(item)
        await asyncio.sleep(0.01)
        if item % 50 == 0:
            raise ConnectionError(f"refused {item}")
        if item % 50 == 1 and cluster.runs[item] < 3:
            raise CommandFailed("once more", 7)
        return item * item

    retry = Retry(attempts=3, initial=0.1, on=lambda error: isinstance(error, ConnectionError | CommandFailed))
    job = Job(cluster, worker, 200, retry=retry, on_error=Record(max_failures=10))
    summary = job.run()
    job.check_output(0, 50, 100, 150)
    assert summary.failed == 4
    assert [cluster.runs[item] for item in (0, 50, 1, 51, 2)] == [3, 3, 3, 3, 1]
    assert summary.executed == 200 + 2 * 8
    failure = read_failure((job.store.published or [])[50])
    assert failure is not None
    assert (failure.error.type, failure.error.message) == ("ConnectionError", "refused 50")


def test_an_outage_pauses_the_run_and_single_items_probe() -> None:
    """What waits in the processes comes back; while it lasts, only probes begin."""
    cluster = FakeCluster(2)
    began: list[float] = []

    async def worker(item: int) -> int:
        note(item)
        now = asyncio.get_running_loop().time()
        began.append(now)
        await asyncio.sleep(0.05)
        if 3 < now < 60:
            raise ConnectionError("the service is away")
        return item * item

    job = Job(cluster, worker, 1_000, retry=Retry(attempts=3, breaker=10, initial=1.0, maximum=8.0))
    job.run()
    job.check_output()
    assert len([moment for moment in began if 5 < moment < 60]) < 20


def test_a_probe_whose_process_dies_is_followed_by_another() -> None:
    """It has told nothing of the outage; the next one does."""
    cluster = FakeCluster(2, restarts=True)

    async def worker(item: int) -> int:
        note(item)
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        if now > 5 and cluster.deaths < 2:  # then nothing but probes runs
            cluster.kill_here()
            await asyncio.sleep(1)
        if 3 < now < 60:
            raise ConnectionError("the service is away")
        return item * item

    job = Job(cluster, worker, 1_000, retry=Retry(attempts=3, breaker=10, initial=1.0, maximum=8.0))

    async def beside() -> None:
        await asyncio.sleep(300)
        job.ran.stop()

    job.run(beside)
    job.check_output()
    assert cluster.deaths == 2


@pytest.mark.parametrize("after", [1, 2])
def test_a_suspect_of_an_earlier_death_outlives_its_process_here(after: int) -> None:
    """It was named when the coordinator died; that a process of the cluster ends with it is no death of that kind."""
    job = Deadly(30, lambda item: item == 7)
    cluster, real = FakeCluster(2, restarts=True), job.worker

    async def worker(item: int) -> int:
        if len(job.started) == 1:
            return await real(item)
        note(item)
        if item in job.started[0] and cluster.runs[item] == 1:
            cluster.kill_here()
            await asyncio.sleep(1)
        await asyncio.sleep(0.05)
        return item

    job.worker = worker  # type: ignore[method-assign]
    assert not job.live(retry=Retry(quarantine_after=after), on_error="record")
    assert job.live(retry=Retry(quarantine_after=after), on_error="record", executor=cluster)
    assert cluster.deaths > 3
    assert job.store.published == [b'{"index":%d,"result":%d}' % (index, index) for index in range(30)]


@pytest.mark.parametrize("timeout", [{"timeout": 1.0}, {"retry": Retry(attempts=1, deadline=1.0)}])
def test_an_attempt_that_takes_too_long_fails_as_ever(timeout: dict[str, Any]) -> None:
    """Its time counts from its own beginning, not from when it was sent."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(lambda item: 5.0 if item == 90 else 0.4), 200, on_error="record", **timeout)
    job.run()
    job.check_output(90)
    failure = read_failure((job.store.published or [])[90])
    assert failure is not None
    assert failure.error.type == "TimeoutError"


def test_a_stop_drains_what_runs_and_takes_back_the_rest() -> None:
    """What is in flight ends and is committed; what had not begun does not begin."""
    cluster, begun = FakeCluster(2), list[int]()
    job = Job(cluster, working(0.5), 500)

    async def beside() -> None:
        await asyncio.sleep(2.2)
        begun.append(len(cluster.runs))
        job.ran.stop()

    with pytest.raises(Stopped):
        job.run(beside)
    assert len(job.store.committed) == len(cluster.runs) == sum(cluster.runs.values()) == begun[0]


def test_a_stop_has_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    """What does not end in that time is cancelled where it runs; what has finished is committed."""
    cluster = FakeCluster(2)
    cancelled: list[int] = []

    async def worker(item: int) -> int:
        note(item)
        try:
            await asyncio.sleep(1_000.0 if item % 10 == 3 else 0.1)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item * item

    job = Job(cluster, worker, 500, drain_timeout=2.0)

    async def beside() -> None:
        await asyncio.sleep(1.0)
        job.ran.stop()

    with pytest.raises(Stopped):
        job.run(beside)
    assert cancelled
    assert "did not end on the cluster" not in caplog.text
    assert set(job.store.committed) == set(cluster.runs) - set(cancelled)


def test_a_process_that_does_not_answer_delays_no_stop_for_ever() -> None:
    """It is left alone after seconds."""
    cluster = FakeCluster(2, lease_s=100.0)
    job = Job(cluster, working(0.5), 500, drain_timeout=2.0)

    async def beside() -> None:
        await asyncio.sleep(1.0)
        cluster.all_seats[0].fall_silent()
        await asyncio.sleep(1.0)
        job.ran.stop()

    with pytest.raises(Stopped):
        job.run(beside)
    assert job.seen[-1].elapsed_s < 20


class Unreadable:
    """It can be sent, and not be made there."""

    def __reduce__(self) -> Any:
        return _not_here, ()

    def __repr__(self) -> str:
        return "unreadable"


def _not_here() -> None:
    raise ValueError("not here")


@pytest.mark.parametrize(
    ("item", "concurrency", "why", "done"),
    [
        (lambda: 0, 2, r".*can not be sent to another process", {0, 1}),
        (Unreadable(), 4, r"\(unreadable\) failed: ValueError: not here", {0, 1, 3}),
    ],
    ids=["sent", "read there"],
)
def test_an_item_that_can_not_be_carried_fails_alone(item: Any, concurrency: int, why: str, done: set[int]) -> None:
    """Its neighbours in the chunk are done."""
    cluster = FakeCluster(1)
    store = Store()

    async def worker(item: Any) -> int:
        note(str(item))
        return 1

    source = IterableSource([1, 2, item, 4], key=str)
    options = Options(executor=cluster, on_error="stop", concurrency=concurrency)
    with pytest.raises(ItemFailed, match=f"item 2 {why}"):
        run_virtual(to_its_end(Run(worker, source, MemoryLedger(store), options)))
    assert done <= store.committed


def test_a_result_without_a_form_as_a_record_fails_as_ever() -> None:
    """The record is made where the item ran, and what is refused there is refused in the same words."""

    async def worker(item: int) -> Any:
        note(item)
        return {1, 2} if item == 3 else item * item

    with pytest.raises(ItemFailed, match=r"item 3 \(3\) failed: ResultRefused: the value holds a set"):
        Job(FakeCluster(2), worker, 10).run()


def test_the_concurrency_can_be_changed_on_the_way() -> None:
    """Shares follow at once, upwards and downwards."""
    cluster, running = FakeCluster(2), [0]
    most: list[int] = []

    async def worker(item: int) -> int:
        note(item)
        running[0] += 1
        most.append(running[0])
        await asyncio.sleep(0.5)
        running[0] -= 1
        return item * item

    job = Job(cluster, worker, 300, concurrency=4)

    async def beside() -> None:
        await asyncio.sleep(3.2)
        assert max(most) == 4
        job.ran.set_concurrency(20)
        await asyncio.sleep(2)
        assert max(most) == 20
        job.ran.set_concurrency(3)
        await asyncio.sleep(1)
        most.clear()
        await asyncio.sleep(5)
        assert max(most) == 3
        job.ran.set_concurrency(50)

    job.run(beside)
    job.check_output()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_concurrency_below_the_number_of_processes_is_obeyed(concurrency: int) -> None:
    """From the start, and when it is set on the way: who has no share begins nothing, also of what waits there."""
    cluster, running = FakeCluster(3), [0]
    most: list[int] = []

    async def worker(item: int) -> int:
        note(item)
        running[0] += 1
        most.append(running[0])
        await asyncio.sleep(0.1)
        running[0] -= 1
        return item * item

    job = Job(cluster, worker, 600, concurrency=concurrency)

    async def beside() -> None:
        await asyncio.sleep(3)
        assert max(most) == concurrency
        job.ran.set_concurrency(30)
        await asyncio.sleep(1.05)
        job.ran.set_concurrency(concurrency)
        await asyncio.sleep(0.2)
        most.clear()
        await asyncio.sleep(3)
        assert max(most) == concurrency
        job.ran.set_concurrency(30)

    job.run(beside)
    job.check_output()
    assert set(cluster.runs.values()) == {1}


def test_suspects_are_tested_also_where_places_are_fewer_than_processes() -> None:
    """The one that tests them has a place then."""
    cluster = FakeCluster(4, restarts=True)

    async def worker(item: int) -> int:
        note(item)
        if item == 5:
            cluster.kill_here()
        await asyncio.sleep(0.05)
        return item * item

    job = Job(cluster, worker, 100, concurrency=2, on_error="record")
    assert job.run().failed == 1
    job.check_output(5)


def test_the_window_and_the_bytes_bound_a_cluster_too() -> None:
    """Nothing is sent beyond them, and the run ends all the same."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(lambda item: 20.0 if item == 0 else 0.01), 500, limits=Limits(window=100))
    job.run()
    job.check_output()
    assert max(seen.frontier - seen.durable_mark for seen in job.seen) <= 100


def test_progress_shows_each_process() -> None:
    """What it was given, what it has done, how fast, and when it was last heard of."""
    job = Job(FakeCluster(2), working(0.1), 400, concurrency=8)
    job.run()
    seen = next(snapshot for snapshot in job.seen if snapshot.elapsed_s > 3).workers
    assert {one.name for one in seen} == {"seat-1", "seat-2"}
    assert all(one.state == "works" and one.items > 80 and one.chunks > 1 for one in seen)
    assert all(35 <= one.items_per_s <= 45 and one.last_seen_s <= 0.6 and one.in_flight > 0 for one in seen)


def test_the_log_says_what_became_of_a_process(caplog: pytest.LogCaptureFixture) -> None:
    """In one line for each that is gone, with the number of items that are given out again."""
    cluster = FakeCluster(2)
    job = Job(cluster, working(0.2), 100)

    async def beside() -> None:
        await asyncio.sleep(1.05)
        cluster.all_seats[0].die()

    with caplog.at_level(logging.WARNING, "async_recovery"):
        job.run(beside)
    assert [record.getMessage() for record in caplog.records if "is gone" in record.getMessage()] != []
