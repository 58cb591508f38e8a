"""A run that other tasks watch and steer while it goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from async_recovery import ItemFailed, Stopped, UsageError, resumable

from .support.virtual_loop import run_virtual

T = TypeVar("T")


class Worker:
    """Takes a second an item.

    :ivar running: how many do so now; `peak`: at most, since it was last set to 0.
    """

    def __init__(self) -> None:
        self.began: list[float] = []
        self.running = self.peak = 0

    async def work(self, item: int) -> int:
        self.began.append(asyncio.get_running_loop().time())
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(1)
        self.running -= 1
        if item < 0:
            raise ValueError("negative")
        return item


def steered(main: Coroutine[Any, Any, T]) -> T:
    return run_virtual(main)


def test_the_block_ends_with_the_run_and_its_summary(tmp_path: Path) -> None:
    """Leaving it waits; the summary is there, and so is the output."""
    worker = Worker()

    async def main() -> int:
        async with resumable(worker.work, range(30), output=tmp_path / "out.jsonl", concurrency=4) as run:
            assert run.progress.finished == 0
        return run.summary.processed

    assert steered(main()) == 30
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 30


def test_a_paused_run_begins_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was in flight ends and is committed; progress says that it is paused."""
    worker = Worker()

    async def main() -> None:
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl", concurrency=4) as run:
            await asyncio.sleep(3.5)
            run.pause()
            run.pause()
            await asyncio.sleep(100)
            assert run.progress.paused == "paused by the caller"
            assert (run.progress.in_flight, run.progress.durable_mark) == (0, 16)
            run.unpause()
            run.unpause()
            await asyncio.sleep(0.5)
            assert run.progress.paused is None

    steered(main())
    assert not [moment for moment in worker.began if 3.5 < moment < 103.5]
    assert len(worker.began) == 40


def test_a_run_can_be_paused_before_it_has_begun(tmp_path: Path) -> None:
    """Nothing begins before it is unpaused."""
    worker = Worker()

    async def main() -> None:
        async with resumable(worker.work, range(4), output=tmp_path / "out.jsonl") as run:
            run.pause()
            await asyncio.sleep(50)
            run.unpause()

    steered(main())
    assert min(worker.began) == 50


@pytest.mark.parametrize("more", [1, 2, 12, 100])
def test_the_concurrency_can_be_changed_while_it_runs(tmp_path: Path, more: int) -> None:
    """Up at once, down as soon as the items in flight are done, and never above it."""
    worker = Worker()

    async def main() -> None:
        async with resumable(worker.work, range(2000), output=tmp_path / "out.jsonl", concurrency=6) as run:
            await asyncio.sleep(2.5)
            assert worker.peak == 6
            run.set_concurrency(more)
            await asyncio.sleep(2)
            worker.peak = 0
            await asyncio.sleep(2)
            assert worker.peak == more
            run.set_concurrency(3)
            run.set_concurrency(5)
            await asyncio.sleep(2)
            worker.peak = 0
            await asyncio.sleep(2)
            assert worker.peak == 5

    steered(main())
    assert len(worker.began) == 2000


def begun_between(worker: Worker, start: float, end: float) -> int:
    return sum(start <= moment < end for moment in worker.began)


@pytest.mark.parametrize("first", [None, 5, 80])
@pytest.mark.parametrize("rate", [0.5, 10, 60])
def test_the_rate_can_be_changed_while_it_runs(tmp_path: Path, first: float | None, rate: float) -> None:
    """No second after the change begins more than the new one allows; None lifts it at once."""
    worker = Worker()

    async def main() -> None:
        output = tmp_path / "out.jsonl"
        async with resumable(worker.work, range(1500), output=output, concurrency=40, rate_limit=first) as run:
            await asyncio.sleep(4.1)
            run.set_rate(rate)
            await asyncio.sleep(20)
            run.set_rate(None)

    steered(main())
    span = max(1.0, 1 / rate)
    limited = [moment for moment in worker.began if 4.1 <= moment < 24.1]
    most = max((begun_between(worker, moment, min(moment + span - 1e-9, 24.1)) for moment in limited), default=0)
    assert most <= max(1, rate)
    assert len(limited) >= min(20 * rate, 20 * 40) * 0.75 - 2
    assert begun_between(worker, 24.1, 25.1) >= 39  # as many as there are workers: nothing holds them back
    assert len(worker.began) == 1500


def test_a_new_rate_counts_what_the_old_one_let_begin(tmp_path: Path) -> None:
    """The second in which it is lowered has no more than the higher one allowed, and the next no more than the new."""
    worker = Worker()

    async def main() -> None:
        output = tmp_path / "out.jsonl"
        async with resumable(worker.work, range(120), output=output, concurrency=90, rate_limit=40) as run:
            await asyncio.sleep(2.95)
            run.set_rate(4)

    steered(main())
    for tenth in range(30, 60):
        assert begun_between(worker, tenth / 10, tenth / 10 + 1) <= 4
    assert not begun_between(worker, 2.95, 3.2)  # those before it were more than four


@pytest.mark.parametrize("first", [None, 50])
def test_the_rate_of_a_plain_function_can_be_changed_while_it_runs(tmp_path: Path, first: float | None) -> None:
    """It begins in threads, later than it was handed out; also where no rate was given at first."""
    began: list[float] = []

    def worker(item: int) -> int:
        began.append(loop[0].time())
        return item

    async def main() -> None:
        loop.append(asyncio.get_running_loop())
        output = tmp_path / "out.jsonl"
        async with resumable(worker, range(30), output=output, concurrency=2, rate_limit=first) as run:
            run.set_rate(5)

    loop: list[asyncio.AbstractEventLoop] = []
    steered(main())
    assert max(sum(start <= moment < start + 1 for moment in began) for start in began) <= 5
    assert len(began) == 30


@pytest.mark.parametrize("rate", [0, -1, True, "4", float("nan"), float("inf")])
def test_a_rate_that_can_not_be_is_refused(tmp_path: Path, rate: Any) -> None:
    """The run goes on as it was."""

    async def main() -> None:
        async with resumable(Worker().work, range(4), output=tmp_path / "out.jsonl") as run:
            with pytest.raises(UsageError, match=r"rate_limit|per_second"):
                run.set_rate(rate)

    steered(main())


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, "4", 10**6])
def test_a_concurrency_that_can_not_be_is_refused(tmp_path: Path, concurrency: Any) -> None:
    """The run goes on as it was."""

    async def main() -> None:
        async with resumable(Worker().work, range(4), output=tmp_path / "out.jsonl") as run:
            with pytest.raises(UsageError, match="concurrency"):
                run.set_concurrency(concurrency)

    steered(main())


def test_stop_drains_commits_and_raises_stopped(tmp_path: Path) -> None:
    """The same call resumes it."""
    worker = Worker()

    async def stopped_block() -> None:
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl", concurrency=4) as run:
            await asyncio.sleep(2.5)
            run.stop()

    async def main() -> None:
        with pytest.raises(Stopped, match="mark 12"):
            await stopped_block()
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl", concurrency=4) as run:
            pass
        assert (run.summary.resumed_from, run.summary.executed) == (12, 28)

    steered(main())


@pytest.mark.parametrize("error", [KeyError("mine"), asyncio.CancelledError()])
def test_an_exception_in_the_block_stops_the_run_and_is_raised(tmp_path: Path, error: BaseException) -> None:
    """What was in flight is committed before."""
    worker = Worker()

    async def block_that_raises() -> None:
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl", concurrency=4):
            await asyncio.sleep(2.5)
            raise error

    async def main() -> None:
        with pytest.raises(type(error)):
            await block_that_raises()
        assert worker.running == 0
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl") as run:
            pass
        assert run.summary.resumed_from == 12

    steered(main())


def test_cancelling_the_block_drains_and_commits(tmp_path: Path) -> None:
    """As it does for `run_resumable`."""
    worker = Worker()

    async def block() -> None:
        async with resumable(worker.work, range(40), output=tmp_path / "out.jsonl", concurrency=4):
            await asyncio.sleep(1000)

    async def main() -> None:
        task = asyncio.ensure_future(block())
        await asyncio.sleep(2.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (len(worker.began), worker.running) == (12, 0)

    steered(main())


def test_the_runs_own_error_is_raised_when_the_block_ends(tmp_path: Path) -> None:
    """A failed item, as from `run_resumable`."""

    async def main() -> None:
        with pytest.raises(ItemFailed, match="negative"):
            async with resumable(Worker().work, [1, -1], output=tmp_path / "out.jsonl"):
                pass

    steered(main())


def test_arguments_are_checked_before_anything_begins(tmp_path: Path) -> None:
    """As by `run_resumable`."""
    with pytest.raises(UsageError, match="concurrency"):
        resumable(Worker().work, [1], output=tmp_path / "out.jsonl", concurrency=0)
    with pytest.raises(UsageError, match="checkpoint"):
        resumable(Worker().work, [1])


def test_more_plain_functions_run_at_once_after_the_concurrency_was_raised(tmp_path: Path) -> None:
    """As many threads as there are workers, not as many as there were at first."""
    everyone = threading.Barrier(6, timeout=30)

    def work(item: int) -> int:
        if item >= 2:
            everyone.wait()
        return item

    async def main() -> None:
        async with resumable(work, range(8), output=tmp_path / "out.jsonl", concurrency=1) as run:
            run.set_concurrency(6)

    asyncio.run(main())


def test_a_run_that_fails_ends_a_block_that_waits_for_something_else(tmp_path: Path) -> None:
    """As a task group would; the error is the run's, and nothing of the cancellation is left."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(ItemFailed, match="negative"):
            async with resumable(Worker().work, [1, -1], output=tmp_path / "out.jsonl"):
                await asyncio.sleep(10**6)
        assert task.cancelling() == 0
        await asyncio.sleep(1)

    steered(main())


def test_a_cancellation_from_outside_is_not_taken_for_that_of_the_run(tmp_path: Path) -> None:
    """Both at once: the block raises the caller's."""

    async def block() -> None:
        async with resumable(Worker().work, [1, -1], output=tmp_path / "out.jsonl") as run:
            try:
                await asyncio.sleep(10**6)
            finally:
                assert run.progress.finished == 1
                tasks[0].cancel()

    async def main() -> None:
        tasks.append(asyncio.ensure_future(block()))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    tasks: list[asyncio.Future[None]] = []
    steered(main())
