"""The jobs of a service, without HTTP: who runs when, and what becomes of each, whatever happens at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from async_recovery.errors import StorageFailed
from async_recovery.file_ledger import FileLedger
from async_recovery.service import manager as manager_module
from async_recovery.service.folder import Folder
from async_recovery.service.jobs import Job, JobOptions, NotNow, RecordOptions
from async_recovery.service.manager import KeyReused, Limits, Manager, TooMany
from async_recovery.service.store import Store

ENDED = ("complete", "failed", "cancelled")


class Work:
    """The workers, and what they have done."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.now = self.most = 0
        self.go = asyncio.Event()
        self.mended = False

    async def quick(self, item: Any) -> Any:
        """Gives other tasks a turn."""
        self.ran.append(item)
        await asyncio.sleep(0)
        return item

    async def held(self, item: Any) -> Any:
        """Until `go`."""
        self.ran.append(item)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.go.wait()
        finally:
            self.now -= 1
        return item

    async def stubborn(self, item: Any) -> Any:
        """Until `go`; no cancellation ends it."""
        self.ran.append(item)
        while not self.go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.go.wait()
        return item

    async def picky(self, item: Any) -> Any:
        """Fails for odd items, until it is mended."""
        self.ran.append(item)
        await asyncio.sleep(0)
        if item % 2 and not self.mended:
            raise ValueError(f"{item} is odd")
        return item

    async def strange(self, item: Any) -> Any:
        """Fails with a text that is no Unicode."""
        raise ValueError("\udc80")


@pytest.fixture
async def work() -> Work:
    return Work()


def manager_of(data: Path, work: Work, **limits: int) -> Manager:
    workers = {name: getattr(work, name) for name in ("quick", "held", "stubborn", "picky", "strange")}
    return Manager(Folder(data), workers, Limits(**limits))


async def submit(manager: Manager, worker: str, *items: Any, **options: Any) -> str:
    """The id of a new job."""
    lines = b"".join(msgspec.json.encode(item) + b"\n" for item in items)
    make_input = partial(manager.folder.write_items, lines=lines)
    job, _ = await manager.submit(worker, JobOptions(**options), make_input)
    return job.id


async def until(holds: Callable[[], object]) -> None:
    """Gives way to all others until it holds."""
    with anyio.fail_after(20):
        while not holds():  # noqa: ASYNC110  no event tells of all that is waited for
            await asyncio.sleep(0.001)


async def end_of(manager: Manager, job: str) -> Job:
    """The job when it has ended."""
    await until(lambda: manager.jobs[job].has_ended)
    return manager.jobs[job]


async def output_of(manager: Manager, job: str) -> list[Any]:
    """What the records of a complete output say."""
    text = await anyio.Path(manager.folder.output(manager.jobs[job])).read_bytes()
    lines = [msgspec.json.decode(line) for line in text.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return [line.get("result", line.get("error")) for line in lines]


def states(manager: Manager) -> list[str]:
    return [job.state for job in manager.jobs.values()]


class Loading:
    """Holds runs while they are loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._go = threading.Event(), threading.Event()
        load = Manager._load

        def held(manager: Manager, job: Job) -> Any:
            self.begun.set()
            assert self._go.wait(20)
            return load(manager, job)

        monkeypatch.setattr(Manager, "_load", held)

    def go(self) -> None:
        self._go.set()


# Places


@pytest.mark.parametrize("places", [1, 2, 3])
async def test_never_more_jobs_run_than_there_are_places_and_the_oldest_first(
    tmp_path: Path, work: Work, places: int
) -> None:
    """However they come; each of the others when there is a place."""
    async with manager_of(tmp_path, work, jobs=places) as manager:
        jobs = [await submit(manager, "held", n) for n in range(7)]
        await until(lambda: work.now == places)
        assert states(manager) == ["running"] * places + ["queued"] * (7 - places)
        work.go.set()
        for job in jobs:
            assert (await end_of(manager, job)).state == "complete"
        assert work.most <= places
        begun = [job.started or 0.0 for job in manager.jobs.values()]
        assert begun == sorted(begun)


async def test_a_paused_job_gives_its_place_away_and_comes_before_those_that_have_not_begun(
    tmp_path: Path, work: Work
) -> None:
    """In its turn, when there is a place again."""
    async with manager_of(tmp_path, work, jobs=1) as manager:
        first, second, third = [await submit(manager, "held", n, n) for n in range(3)]
        await until(lambda: work.ran == [0, 0])
        await manager.pause(first)
        await until(lambda: states(manager) == ["paused", "running", "queued"])
        await manager.unpause(first)
        assert states(manager) == ["queued", "running", "queued"]
        await manager.cancel(second)
        await until(lambda: states(manager) == ["running", "cancelled", "queued"])
        work.go.set()
        assert (await end_of(manager, third)).state == "complete"
        assert await output_of(manager, first) == [0, 0]


async def test_the_bounds_of_the_queue(tmp_path: Path, work: Work) -> None:
    """One more is refused and leaves nothing; those that have ended count for one of them alone."""
    async with manager_of(tmp_path, work, queued=2, remembered=3) as manager:
        jobs = [await submit(manager, "held", n) for n in range(2)]
        with pytest.raises(TooMany, match="wait or run"):
            await submit(manager, "held", 9)
        work.go.set()
        for job in jobs:
            await end_of(manager, job)
        jobs.append(await submit(manager, "held", 3))
        with pytest.raises(TooMany, match="are remembered"):
            await submit(manager, "held", 9)
        await manager.delete(jobs[0])
        assert (await end_of(manager, await submit(manager, "held", 4))).state == "complete"
        folders = [path.name async for path in anyio.Path(tmp_path / "jobs").iterdir()]
        assert sorted(folders) == sorted(manager.jobs)


async def test_a_job_that_is_gone_before_its_turn_stops_nobody(tmp_path: Path, work: Work) -> None:
    """It was about to begin when it was cancelled and deleted: those behind it begin."""
    async with manager_of(tmp_path, work, jobs=3) as manager, asyncio.TaskGroup() as tasks:
        async with manager._changing:
            for n in range(3):
                tasks.create_task(submit(manager, "quick", n))
        await until(lambda: len(manager.jobs) == 3)
        await until(lambda: all(job.has_ended for job in manager.jobs.values()) and not manager._running)
        for job in manager.jobs:
            manager.jobs[job] = msgspec.structs.replace(manager.jobs[job], state="queued", started=None)
        gone = list(manager.jobs)[1]
        await manager._changing.acquire()  # the scheduler waits for it, to begin the first one
        manager._due.set()
        await until(lambda: manager._changing._waiters)
        cancel = asyncio.create_task(manager.cancel(gone))
        await until(lambda: len(manager._changing._waiters or ()) == 2)
        delete = asyncio.create_task(manager._delete(gone))
        await until(lambda: len(manager._changing._waiters or ()) == 3)
        manager._changing.release()
        await asyncio.gather(cancel, delete)
        await until(lambda: states(manager) == ["complete", "complete"])
        assert (await end_of(manager, await submit(manager, "quick", 9))).state == "complete"


# Steering


@pytest.mark.parametrize("steps", [["pause"], ["pause", "unpause", "pause"], ["pause", "pause"]])
async def test_a_pause_before_the_run_is_loaded_holds(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch, steps: list[str]
) -> None:
    """Nothing of it runs until it is unpaused."""
    loading = Loading(monkeypatch)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "quick", 1, 2)
        await until(loading.begun.is_set)
        for step in steps:
            await getattr(manager, step)(job)
        loading.go()
        await until(lambda: (sample := manager.sample(job)) is not None and sample.paused)
        assert (work.ran, states(manager)) == ([], ["paused"])
        await manager.unpause(job)
        assert (await end_of(manager, job)).state == "complete"
        assert work.ran == [1, 2]


async def test_of_many_paused_jobs_only_the_latest_stay_loaded(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once nothing of them is in flight; all of them go on where they were, whenever they are unpaused."""
    monkeypatch.setattr(manager_module, "PAUSED_RUNS", 2)
    monkeypatch.setattr(manager_module, "TICK_S", 0.001)
    async with manager_of(tmp_path, work, jobs=1) as manager:
        jobs = []
        for n in range(8):
            jobs.append(await submit(manager, "held", *range(10 * n, 10 * n + 4), concurrency=2))
            await until(lambda: work.now == 2 * len(jobs))
            await manager.pause(jobs[-1])
        assert set(manager._runners) == set(jobs), "of each something is in flight"
        work.go.set()
        await until(lambda: set(manager._runners) == set(jobs[-2:]))
        assert states(manager) == ["paused"] * 8
        assert len(work.ran) == 16
        for job in jobs:
            await manager.unpause(job)
        for n, job in enumerate(jobs):
            assert (await end_of(manager, job)).state == "complete"
            assert await output_of(manager, job) == list(range(10 * n, 10 * n + 4))
        assert len(work.ran) == 32, "nothing ran twice"


async def test_a_job_that_gets_its_place_while_its_run_is_unloaded_gets_another_run(tmp_path: Path, work: Work) -> None:
    """It is never taken for running without one."""
    async with manager_of(tmp_path, work, jobs=1) as manager:
        job = await submit(manager, "held", 1, 2, drain_timeout=0)
        await until(lambda: work.now == 2)
        manager._runners[job].run.stop()
        await until(lambda: len(work.ran) == 4)
        assert states(manager) == ["running"]
        work.go.set()
        assert (await end_of(manager, job)).state == "complete"


async def test_a_job_unpaused_while_it_is_loaded_runs(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if nothing had been asked."""
    loading = Loading(monkeypatch)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "quick", 1, 2)
        await until(loading.begun.is_set)
        await manager.pause(job)
        await manager.unpause(job)
        loading.go()
        assert (await end_of(manager, job)).state == "complete"
        assert work.ran == [1, 2]


async def test_a_job_cancelled_while_it_is_loaded_runs_nothing(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And can be deleted."""
    loading = Loading(monkeypatch)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "quick", 1, 2)
        await until(loading.begun.is_set)
        await manager.cancel(job)
        loading.go()
        await manager.delete(job)
        assert (work.ran, manager.jobs) == ([], {})


async def test_what_changes_while_a_run_is_loaded_holds_for_it(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown is what is so."""
    loading = Loading(monkeypatch)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "held", *range(10), concurrency=2)
        await until(loading.begun.is_set)
        await manager.change(job, concurrency=5, rate=1000)
        loading.go()
        await until(lambda: work.now == 5)
        work.go.set()
        await end_of(manager, job)
        assert work.most == 5


async def test_a_job_can_be_deleted_and_retried_in_the_moment_when_it_ends(tmp_path: Path, work: Work) -> None:
    """Whoever is told that it is complete can go on at once."""
    async with manager_of(tmp_path, work) as manager:
        for _ in range(5):
            job = await submit(manager, "picky", *range(4), on_error="record")
            async for _ in manager.feed(job).messages(None):
                if manager.jobs[job].has_ended:
                    break
            assert (await manager.retry_failed(job)).state == "queued"
            with pytest.raises(NotNow):
                await manager.delete(job)
            async for _ in manager.feed(job).messages(None):
                if manager.jobs[job].has_ended:
                    break
            await manager.delete(job)
        assert manager.jobs == {}


async def test_many_requests_to_retry_are_one_retry(tmp_path: Path, work: Work) -> None:
    """The others are refused."""
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "picky", *range(6), on_error="record")
        assert (await end_of(manager, job)).summary is not None
        answers = await asyncio.gather(*(manager.retry_failed(job) for _ in range(10)), return_exceptions=True)
        assert Counter(type(answer) for answer in answers) == {Job: 1, NotNow: 9}
        await until(lambda: manager.jobs[job].has_ended)
        assert Counter(work.ran) == {0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 5: 2}


async def test_the_same_key_makes_one_job_also_where_nobody_waits_for_the_answer(tmp_path: Path, work: Work) -> None:
    """A caller that gives up at any moment leaves a whole job, or none; the same request then gives the same job."""
    async with manager_of(tmp_path, work) as manager:

        def ask(key: int, lines: bytes) -> Awaitable[tuple[Job, bool]]:
            make_input = partial(manager.folder.write_items, lines=lines)
            return manager.submit("quick", JobOptions(), make_input, key=f"key-{key}", asked=lines)

        for turns in range(60):
            request = partial(ask, turns, b"%d" % turns)
            given_up = asyncio.ensure_future(request())
            for _ in range(turns):
                await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait({given_up})
            first, _ = await request()
            second, is_new = await request()
            assert (first.id, is_new) == (second.id, False)
        with pytest.raises(KeyReused):
            await ask(1, b"other")
        assert len(manager.jobs) == 60
        await until(lambda: all(job.state == "complete" for job in manager.jobs.values()))
    async with manager_of(tmp_path, work) as manager:
        assert len(manager.jobs) == 60
        assert len([path async for path in anyio.Path(tmp_path / "jobs").iterdir()]) == 60


async def steer_at_random(manager: Manager, jobs: list[str], dice: random.Random, steps: int) -> None:
    """Anything that can be asked, and is not for good."""
    for _ in range(steps):
        job = dice.choice(jobs)
        asked: Callable[[], Awaitable[object]] = dice.choice(
            [
                partial(manager.pause, job),
                partial(manager.unpause, job),
                partial(manager.retry_failed, job),
                partial(manager.change, job, concurrency=dice.randint(1, 20)),
                partial(manager.change, job, rate=dice.choice([None, 500, 2000])),
            ]
        )
        with contextlib.suppress(NotNow, StorageFailed):
            await asked()
        for _ in range(dice.randint(0, 3)):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(12))
async def test_jobs_that_many_steer_at_once_are_all_done_once(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """In any order: all complete, outputs right, nothing ran twice; with every second seed, the database fails now and
    then. The next start finds what was there."""
    dice = random.Random(seed)
    if seed % 2:
        fail_writes(monkeypatch, lambda: dice.random() < 0.2)
    async with manager_of(tmp_path, work, jobs=dice.randint(1, 3)) as manager:
        jobs: list[str] = []
        while len(jobs) < 4:
            begin = 100 * len(jobs)
            with contextlib.suppress(StorageFailed):
                jobs.append(await submit(manager, "picky", *range(begin, begin + 40), on_error="record", concurrency=3))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                tasks.create_task(steer_at_random(manager, jobs, random.Random(dice.random()), 25))
        work.mended = True
        for job in jobs:
            while manager.jobs[job].state != "complete" or (manager.jobs[job].summary or {})["failed"]:
                with contextlib.suppress(NotNow, StorageFailed):
                    await manager.unpause(job)
                with contextlib.suppress(NotNow, StorageFailed):
                    await manager.change(job, rate=None)
                with contextlib.suppress(NotNow, StorageFailed):
                    await manager.retry_failed(job)
                await asyncio.sleep(0.001)
        for n, job in enumerate(jobs):
            assert await output_of(manager, job) == list(range(100 * n, 100 * n + 40))
        counts = Counter(work.ran)
        assert all(counts[item] == 1 for item in counts if item % 2 == 0)
        monkeypatch.undo()
        left = dict(manager.jobs)
    async with manager_of(tmp_path, work) as manager:
        assert manager.jobs == left


# Storage that fails


def fail_writes(monkeypatch: pytest.MonkeyPatch, fails: Callable[[], bool]) -> None:
    """A write of the database fails when it is told to."""
    write = Store._write

    def failing(store: Store, sql: str, *values: object) -> None:
        if fails():
            raise sqlite3.OperationalError("database or disk is full")
        write(store, sql, *values)

    monkeypatch.setattr(Store, "_write", failing)


async def insisting(change: Callable[[], Awaitable[Any]]) -> Any:
    """Until it can be done."""
    while True:
        try:
            return await change()
        except StorageFailed:
            await asyncio.sleep(0)


async def one_life(manager: Manager, work: Work) -> None:
    """A job from its beginning to its end, with all that can be asked."""
    job = await insisting(lambda: submit(manager, "held", 1, 2, concurrency=1))
    await until(lambda: work.now == 1)
    await insisting(lambda: manager.pause(job))
    await insisting(lambda: manager.change(job, concurrency=2))
    await insisting(lambda: manager.unpause(job))
    work.go.set()
    await end_of(manager, job)
    other = await insisting(lambda: submit(manager, "picky", 1, 2, on_error="record"))
    await end_of(manager, other)
    await insisting(lambda: manager.retry_failed(other))
    await end_of(manager, other)
    await insisting(lambda: manager.delete(job))


async def test_a_database_that_fails_at_any_one_write_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is asked for is refused and can be asked for again; what has happened is remembered later."""
    caplog.set_level(logging.CRITICAL)
    fail_at = 0
    while True:
        data, work, count = tmp_path / str(fail_at), Work(), 0

        def fails() -> bool:
            nonlocal count
            count += 1
            return count == fail_at  # noqa: B023  called in this round alone

        with monkeypatch.context() as context:
            fail_writes(context, fails)
            async with manager_of(data, work) as manager:
                await one_life(manager, work)
                assert states(manager) == ["complete"]
                left = dict(manager.jobs)
            assert Counter(work.ran) == {1: 3, 2: 2}
        async with manager_of(data, work) as manager:
            assert manager.jobs == left
        if count < fail_at:
            break
        fail_at += 1
    assert fail_at > 12


async def test_a_job_whose_state_could_not_be_remembered_is_done_once_all_the_same(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is away from its beginning to its end, and the service is killed: its checkpoint knows."""
    broken = False
    fail_writes(monkeypatch, lambda: broken)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "held", 1, 2)
        await until(lambda: work.now == 2)
        broken = True
        work.go.set()
        assert (await end_of(manager, job)).state == "complete"
    broken = False
    async with manager_of(tmp_path, work) as manager:
        assert manager.jobs[job].state == "queued"
        done = await end_of(manager, job)
        assert (done.state, (done.summary or {})["executed"]) == ("complete", 0)
        assert sorted(work.ran) == [1, 2]


def fail_commits(monkeypatch: pytest.MonkeyPatch, fails: Callable[[], bool]) -> None:
    """A commit of a run fails when it is told to."""
    commit = FileLedger._commit

    def failing(ledger: FileLedger, what: Any) -> None:
        if fails():
            raise OSError(28, "No space left on device")
        commit(ledger, what)

    monkeypatch.setattr(FileLedger, "_commit", failing)
    monkeypatch.setattr(manager_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(manager_module, "LONGEST_WAIT_S", 0.01)


async def test_a_job_whose_storage_fails_waits_in_the_queue_and_goes_on(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself; it says why meanwhile. Another job runs on."""
    full = False
    fail_commits(monkeypatch, lambda: full)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "held", 1, 2, batch_size=1)
        await until(lambda: work.now == 2)
        full = True
        work.go.set()
        await until(lambda: len(manager.jobs[job].events) > 8)
        assert "No space left on device" in str(manager.jobs[job].events)
        full = False
        assert (await end_of(manager, job)).state == "complete"
        assert await output_of(manager, job) == [1, 2]


async def test_a_paused_job_whose_storage_fails_goes_on_only_when_it_is_unpaused(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why nothing of what was in flight is kept."""
    full = False
    fail_commits(monkeypatch, lambda: full)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "held", 1, 2, batch_size=1)
        await until(lambda: work.now == 2)
        await manager.pause(job)
        full = True
        work.go.set()
        await until(lambda: manager.jobs[job].reason)
        await until(lambda: not manager._running)
        full = False
        assert (await end_of(manager, await submit(manager, "quick", 3))).state == "complete"
        assert manager.jobs[job].state == "paused"
        assert work.ran == [1, 2, 3]
        await manager.unpause(job)
        assert (await end_of(manager, job)).state == "complete"


async def test_a_run_that_fails_while_its_job_gets_its_place_again_is_not_forgotten(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused, waits for a place, gets one, and its storage fails in that moment."""
    full = False
    fail_commits(monkeypatch, lambda: full)
    async with manager_of(tmp_path, work, jobs=1) as manager:
        job = await submit(manager, "held", 1, 2, batch_size=1)
        await until(lambda: work.now == 2)
        await manager.pause(job)
        other = await submit(manager, "stubborn", 3)
        await until(lambda: states(manager) == ["paused", "running"])
        await manager.unpause(job)
        async with manager._changing:
            manager.limits = Limits(jobs=2)
            manager._due.set()
            await until(lambda: manager._changing._waiters)  # the scheduler, to give it the place
            full = True
            work.go.set()
            await until(lambda: job not in manager._runners)
        full = False
        for one in (job, other):
            assert (await end_of(manager, one)).state == "complete"


async def test_a_failure_that_can_not_be_written_down_as_it_is_ends_the_job(tmp_path: Path, work: Work) -> None:
    """Its text is no Unicode: it is told escaped, and the others go on."""
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "strange", 1)
        assert r"ValueError: \udc80" in ((await end_of(manager, job)).reason or "")
        retried = await submit(manager, "strange", 1, retry=2, on_error="record")
        assert ((await end_of(manager, retried)).summary or {})["failed"] == 1
        assert (await end_of(manager, await submit(manager, "quick", 1))).state == "complete"


# Its end, and the next start


@pytest.mark.parametrize("hurry", [False, True])
async def test_an_exit_during_everything_keeps_what_has_finished(tmp_path: Path, work: Work, hurry: bool) -> None:
    """A job that runs, one that is paused with items in flight, one that waits; the next start does the rest."""
    manager = await manager_of(tmp_path, work, jobs=2).__aenter__()
    running = await submit(manager, "held", 1, 2, drain_timeout=100)
    paused = await submit(manager, "held", 3, 4, 5, concurrency=2, drain_timeout=100)
    waiting = await submit(manager, "quick", 6)
    await until(lambda: work.now == 4)
    await manager.pause(paused)
    await until(lambda: manager.jobs[waiting].state == "complete")
    await manager.pause(running)
    await manager.unpause(running)
    leaving = asyncio.create_task(manager.__aexit__())
    if hurry:
        await until(lambda: not manager.is_open)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    else:
        work.go.set()
        await leaving
    work.go.set()
    async with manager_of(tmp_path, work) as manager:
        assert (await end_of(manager, running)).state == "complete"
        assert manager.jobs[paused].state == "paused"
        await manager.unpause(paused)
        assert (await end_of(manager, paused)).state == "complete"
        assert await output_of(manager, paused) == [3, 4, 5]
    twice = 1 if hurry else 0
    assert Counter(work.ran) == {1: 1 + twice, 2: 1 + twice, 3: 1 + twice, 4: 1 + twice, 5: 1, 6: 1}


async def test_an_exit_waits_no_longer_than_a_worker_may_take_that_can_not_be_cancelled(
    tmp_path: Path, work: Work
) -> None:
    """It is left alone; the lock is given back, and the next start runs its item again."""
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "stubborn", 1, drain_timeout=0)
        await until(lambda: work.ran == [1])
    work.go.set()
    async with manager_of(tmp_path, work) as manager:
        assert (await end_of(manager, job)).state == "complete"
    assert work.ran == [1, 1]


@pytest.mark.parametrize("scope", [False, True])
async def test_an_exit_that_is_cancelled_gives_the_folder_back_only_when_all_has_ended(
    tmp_path: Path, work: Work, scope: bool
) -> None:
    """Cancelled once or all the time: nothing runs any more when it is over."""

    async def serve() -> None:
        with anyio.CancelScope() as cancelling:
            async with manager_of(tmp_path, work) as manager:
                await submit(manager, "held", 1, 2, drain_timeout=100)
                await until(lambda: work.now == 2)
                if scope:
                    cancelling.cancel()
                manager.drain()
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    task = asyncio.create_task(serve())
    await asyncio.wait({task})
    assert work.now == 0
    work.go.set()
    async with manager_of(tmp_path, work) as manager:
        await until(lambda: states(manager) == ["complete"])


async def test_a_job_that_is_about_to_begin_when_the_service_stops_begins_at_the_next_start(
    tmp_path: Path, work: Work
) -> None:
    """Nothing of it runs when the folder has been given back."""
    manager = await manager_of(tmp_path, work).__aenter__()
    async with manager._changing:
        adding = asyncio.create_task(submit(manager, "quick", 1))
        await asyncio.sleep(0)
    job = await adding
    async with manager._changing:
        if not manager._runners:
            await until(lambda: manager._changing._waiters or manager._running)
        leaving = asyncio.create_task(manager.__aexit__())
        await until(lambda: not manager.is_open)
    await leaving
    assert not manager._running
    async with manager_of(tmp_path, work) as manager:
        assert (await end_of(manager, job)).state == "complete"
    assert work.ran == [1]


async def test_what_is_asked_after_the_end_is_refused(tmp_path: Path, work: Work) -> None:
    """By an error of ours, and nothing is left of it."""
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "picky", 1, on_error="record")
        await end_of(manager, job)
    changes: list[Callable[[], Awaitable[Any]]] = [
        lambda: submit(manager, "quick", 1),
        lambda: manager.retry_failed(job),
    ]
    for change in changes:
        with pytest.raises(StorageFailed, match="the service has stopped"):
            await change()
    assert [path.name async for path in anyio.Path(tmp_path / "jobs").iterdir()] == [job]


# Retries


async def test_a_retry_goes_on_at_the_next_start_where_it_was(tmp_path: Path, work: Work) -> None:
    """What of it was committed is not run once more."""
    async with manager_of(tmp_path, work) as manager:
        options = {"on_error": "record", "batch_size": 1, "concurrency": 1, "drain_timeout": 0}
        job = await submit(manager, "picky", *range(8), **options)
        await end_of(manager, job)
        manager.workers["picky"] = _slow_at_5(work)
        await manager.retry_failed(job)
        await until(lambda: (sample := manager.sample(job)) is not None and sample.durable_mark == 2)
        await until(lambda: work.ran[-1] == "at 5")
    assert manager.jobs[job].state == "running"
    work.ran.clear()
    work.mended = True
    async with manager_of(tmp_path, work) as manager:
        assert manager.jobs[job].retries_of is not None
        done = await end_of(manager, job)
        assert (done.state, done.summary) == ("complete", {**(done.summary or {}), "failed": 0, "total_items": 8})
        assert await output_of(manager, job) == list(range(8))
    assert work.ran == [5, 7]


def _slow_at_5(work: Work) -> Callable[[Any], Awaitable[Any]]:
    """The same worker by its name, mended, which stays at one item."""

    async def picky(item: Any) -> Any:
        if item == 5:
            work.ran.append("at 5")
            await asyncio.Event().wait()
        return item

    picky.__module__, picky.__qualname__ = Work.picky.__module__, Work.picky.__qualname__
    return picky


async def test_a_retry_that_was_killed_after_its_output_was_published_is_not_done_again(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its items have failed again: they are counted right, and can be retried once more."""
    broken = False
    fail_writes(monkeypatch, lambda: broken)
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "picky", *range(6), on_error=RecordOptions(None))
        await end_of(manager, job)
        before = await output_of(manager, job)
        await manager.pause(await submit(manager, "held", 9))
        await manager.retry_failed(job)
        broken = True
        done = await end_of(manager, job)
    assert Counter(work.ran)[1] == 2
    broken, work.mended = False, True
    async with manager_of(tmp_path, work) as manager:
        assert manager.jobs[job].retries_of is not None
        found = await end_of(manager, job)
        assert (found.summary or {})["failed"] == (done.summary or {})["failed"] == 3
        assert (found.summary or {})["executed"] == 0
        assert found.retries_of is None
        assert await output_of(manager, job) == before
        assert Counter(work.ran)[1] == 2, "nothing ran again"
        await manager.retry_failed(job)
        assert ((await end_of(manager, job)).summary or {})["failed"] == 0
        assert await output_of(manager, job) == list(range(6))


async def test_a_retry_whose_output_is_gone_fails_and_says_so(tmp_path: Path, work: Work) -> None:
    """It is never taken for one that is done, nor does the whole job run again."""
    async with manager_of(tmp_path, work) as manager:
        job = await submit(manager, "picky", *range(4), on_error="record")
        await end_of(manager, job)
        output = anyio.Path(manager.folder.output(manager.jobs[job]))
        away = await output.rename(tmp_path / "away")
        with pytest.raises(NotNow, match="missing"):
            await manager.retry_failed(job)
        async with manager._changing:
            await away.rename(output)
            asking = asyncio.create_task(manager.retry_failed(job))
            manager.limits = Limits(jobs=0)  # it does not begin yet
        await asking
        await output.unlink()
        manager.limits = Limits()
        manager._due.set()
        done = await end_of(manager, job)
        assert (done.state, "is missing" in (done.reason or "") or "no output" in (done.reason or "")) == (
            "failed",
            True,
        )
        assert Counter(work.ran)[0] == Counter(work.ran)[2] == 1
