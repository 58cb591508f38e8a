"""What the engine does when items fail, on a clock of its own: attempts, pauses, limits and recorded failures."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import pytest

from async_recovery import (
    ItemFailed,
    IterableSource,
    Progress,
    RateLimit,
    Record,
    Retry,
    RunSummary,
    SlowDown,
    Spent,
    TooManyFailures,
    UsageError,
)
from async_recovery.engine import Run, to_its_end
from async_recovery.options import Limits, Options

from .support.memory_ledger import MemoryLedger, Store
from .support.threaded_loop import run as run_threaded
from .support.virtual_loop import VirtualLoop, run_virtual

Answer = Callable[[int, int], Any]


class Service:
    """What the workers call: it knows every attempt, and answers as `answer` says.

    :ivar attempts: (moment, index) of every attempt, in order.
    """

    def __init__(self, count: int, answer: Answer, *, latency: float = 1.0) -> None:
        self.count = count
        self.attempts: list[tuple[float, int]] = []
        self.store = Store()
        self.slow: dict[int, float] = {}
        self._answer = answer
        self._latency = latency
        self._tries: dict[int, int] = {}
        self.last: Run

    async def worker(self, index: int) -> Any:
        self._tries[index] = attempt = self._tries.get(index, 0) + 1
        self.attempts.append((asyncio.get_running_loop().time(), index))
        await asyncio.sleep(self.slow.get(index, self._latency))
        answer = self._answer(index, attempt)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def run(self, *, concurrency: int = 4, **options: Any) -> RunSummary:
        """One life of the job."""
        self.store.reborn()

        async def main() -> RunSummary:
            chosen = Options(concurrency=concurrency, **options)
            chosen.check()
            self.last = Run(self.worker, IterableSource(range(self.count)), MemoryLedger(self.store), chosen)
            return await to_its_end(self.last)

        return run_virtual(main())

    def tries_of(self, index: int) -> int:
        return self._tries.get(index, 0)

    @property
    def output(self) -> list[Any]:
        assert self.store.published is not None
        return [json.loads(line) for line in self.store.published]


def fails_first(times: int, *only: int) -> Answer:
    """Each item, or only those, fails so often before it succeeds."""

    def answer(index: int, attempt: int) -> Any:
        if attempt <= times and (not only or index in only):
            return ConnectionError(f"attempt {attempt}")
        return {"value": index}

    return answer


def always(*only: int) -> Answer:
    return lambda index, attempt: ValueError(f"{index} is bad") if index in only else {"value": index}


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it can not say what it is")


def test_an_exception_that_can_not_be_written_out_is_a_failure_like_any_other() -> None:
    """It is recorded by its type, and does not stop the job; without recording it stops it under its own name."""
    service = Service(3, lambda index, attempt: _Mute() if index == 1 else index)
    assert service.run(on_error="record").failed == 1
    assert service.output[1]["error"] == {"type": "_Mute", "message": ""}
    with pytest.raises(ItemFailed, match=r"item 1 \(1\) failed: _Mute"):
        Service(3, lambda index, attempt: _Mute() if index == 1 else index).run()


def test_the_bound_that_was_exceeded_is_told_with_all_that_failed() -> None:
    """What fails in the drain counts too: a bound of the number that is told is enough."""
    service = Service(9, lambda index, attempt: ValueError("bad"))
    service.slow = {index: 1.0 + index / 10 for index in range(9)}
    with pytest.raises(TooManyFailures, match="failed items: 4, more than max_failures=0 allows"):
        service.run(concurrency=4, on_error=Record(max_failures=0))


# Retry


def test_an_item_that_fails_is_tried_again_until_it_succeeds() -> None:
    """The output is that of a service that never fails, and each attempt counts as a worker run."""
    service = Service(10, fails_first(3))
    summary = service.run(retry=Retry(attempts=4, breaker=None))
    assert service.output == [{"index": index, "value": index} for index in range(10)]
    assert (summary.executed, summary.failed) == (40, 0)


def test_a_number_is_a_retry_with_that_many_attempts() -> None:
    """`retry=3`: the third failure is the item's."""
    service = Service(3, fails_first(3, 1))
    with pytest.raises(ItemFailed, match=r"item 1 \(1\) failed: ConnectionError: attempt 3"):
        service.run(retry=3)
    assert service.tries_of(1) == 3


def test_an_item_that_waits_for_its_next_attempt_holds_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one worker, all others are done while the first item waits."""
    monkeypatch.setattr("random.random", lambda: 1.0)
    service = Service(20, fails_first(1, 0))
    service.run(concurrency=1, retry=Retry(initial=200, maximum=200, breaker=None))
    assert [index for _, index in service.attempts] == [*range(20), 0]


def test_a_failure_that_is_not_worth_it_is_not_tried_again() -> None:
    """`on=` decides."""
    service = Service(3, always(1))
    with pytest.raises(ItemFailed, match="1 is bad"):
        service.run(retry=Retry(on=OSError))
    assert service.tries_of(1) == 1


def test_a_worker_that_raises_cancelled_error_is_tried_again() -> None:
    """A library's own cancellation is a failure like another."""
    service = Service(2, lambda index, attempt: asyncio.CancelledError() if (index, attempt) == (0, 1) else index)
    service.run(retry=2)
    assert service.tries_of(0) == 2


def test_attempts_are_remembered_over_crashes() -> None:
    """However often the process dies, an item starts at most `attempts` times, and once more for each crash; a failure
    that was committed counts.
    """
    for crash_after in (3, 7, 15, 16, 30, 31, 32, 60, 90):
        service = Service(6, always(2), latency=1.0)
        options: dict[str, Any] = {
            "retry": Retry(attempts=5, initial=20, maximum=20, breaker=None),
            "on_error": "record",
            "checkpoint_interval": 1.0,
        }
        crashes = 0
        while crash_after * (crashes + 1) < 150 and service.store.published is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("random.random", lambda: 1.0)
                crashes += kill_at(service, crash_after, **options)
        if service.store.published is None:
            service.run(**options)
        assert service.tries_of(2) <= 5 + crashes
        assert all(service.tries_of(index) <= 1 + crashes for index in (0, 1, 3, 4, 5))
        assert service.output[2] == {
            "index": 2,
            "error": {"type": "ValueError", "message": "2 is bad"},
            "item": 2,
        }


def kill_at(service: Service, moment: float, **options: Any) -> bool:
    """A life that ends at that moment, if it has not ended before; whether it was killed."""
    service.store.reborn()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        run = Run(service.worker, IterableSource(range(service.count)), MemoryLedger(service.store), Options(**options))
        running = asyncio.ensure_future(to_its_end(run))
        await asyncio.wait({running}, timeout=moment)
        if not running.done():
            service.store.dead = True
            running.cancel()
            run.cancel()
            await asyncio.wait({running})
        assert loop.time() >= 0

    run_virtual(main())
    return service.store.dead


def test_what_was_spent_is_in_the_checkpoint_until_the_item_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed attempts are committed like results; nothing is left of them in the end."""
    service = Service(3, fails_first(2, 1))
    monkeypatch.setattr("random.random", lambda: 1.0)
    assert kill_at(service, 10, retry=Retry(initial=30, maximum=30, breaker=None), checkpoint_interval=0.5)
    assert service.store.spent == {1: Spent(1, 1)}
    service.run(retry=Retry(initial=30, breaker=None))
    assert service.store.spent == {}
    assert service.tries_of(1) == 3


def test_a_job_that_stopped_at_an_item_gives_it_all_its_attempts_again() -> None:
    """Whoever runs the line again has mended the cause: one attempt that is left over would be no chance."""
    service = Service(3, always(1))
    for life in (1, 2, 3):
        with pytest.raises(ItemFailed):
            service.run(retry=Retry(attempts=4, breaker=None))
        assert service.tries_of(1) == 4 * life
    assert service.store.spent == {}


def test_a_deadline_bounds_the_whole_time_of_an_item() -> None:
    """Waits and attempts together; an attempt under way is ended by it."""
    service = Service(2, always(0), latency=1.0)
    service.run(retry=Retry(attempts=100, initial=1, maximum=1, deadline=30), on_error="record")
    moments = [moment for moment, index in service.attempts if index == 0]
    assert 10 < len(moments) < 31
    assert moments[-1] < 30
    endless = Service(2, always(), latency=500.0)
    endless.run(retry=Retry(deadline=30), on_error="record")
    assert [line["error"]["message"] for line in endless.output] == ["the whole time that an item may take is over"] * 2


# Time limits


def test_an_attempt_that_takes_too_long_fails() -> None:
    """It is cancelled, and tried again like after any failure; the message is the same in each run."""
    service = Service(3, lambda index, attempt: index, latency=40.0)
    summary = service.run(timeout=30, retry=Retry(attempts=2, breaker=None), on_error="record")
    error = {"type": "TimeoutError", "message": "no result within 30 s"}
    assert service.output == [{"index": index, "error": error, "item": index} for index in range(3)]
    assert (summary.failed, summary.executed) == (3, 6)


def test_attempts_that_are_in_time_are_left_alone() -> None:
    """Each attempt has its own limit, however long the run takes."""
    service = Service(40, lambda index, attempt: index, latency=29.0)
    assert service.run(timeout=30, concurrency=3).executed == 40


def test_after_a_time_limit_the_worker_task_is_as_if_never_cancelled() -> None:
    """`asyncio.timeout` and task groups inside the next item's worker must not see an old cancellation."""
    seen = []

    async def worker(item: int) -> int:
        task = asyncio.current_task()
        assert task is not None
        seen.append(task.cancelling())
        async with asyncio.timeout(50):
            await asyncio.sleep(100 if item == 0 else 1)
        return item

    options = Options(concurrency=1, timeout=10, on_error="record")
    run_virtual(to_its_end(Run(worker, IterableSource(range(3)), MemoryLedger(Store()), options)))
    assert seen == [0, 0, 0]


def test_a_worker_that_swallows_its_time_limit_is_cancelled_again() -> None:
    """One that goes on anyway gets another cancellation, and its item fails then."""

    async def worker(item: int) -> int:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            await asyncio.sleep(1000)
        return item

    store = Store()
    options = Options(concurrency=1, timeout=10, on_error="record")
    run_virtual(to_its_end(Run(worker, IterableSource(range(2)), MemoryLedger(store), options)))
    assert store.published is not None
    assert b"no result within 10 s" in store.published[0]


def test_a_plain_function_is_let_end_and_its_late_result_does_not_count() -> None:
    """Its slot stays taken until it returns; it is not tried again before."""
    began: list[tuple[float, int]] = []

    def worker(item: int) -> int:
        began.append((loops[0].now, item))
        loops[0].now += 40 if item == 0 and len(began) == 1 else 1  # nobody else moves the clock while a thread runs
        return item

    async def main() -> RunSummary:
        running = asyncio.get_running_loop()
        assert isinstance(running, VirtualLoop)
        loops.append(running)
        running.jobs += 1  # its clock stands still but for what the worker does
        options = Options(concurrency=1, timeout=30, retry=Retry(attempts=2, initial=0))
        return await to_its_end(Run(worker, IterableSource(range(3)), MemoryLedger(store), options))

    loops: list[VirtualLoop] = []
    store = Store()
    assert run_virtual(main()).executed == 4
    assert [item for _, item in began].count(0) == 2
    assert store.published == [b'{"index":%d,"result":%d}' % (index, index) for index in range(3)]


@pytest.mark.parametrize("timeout", [0, -1, "5", True])
def test_a_time_limit_that_can_not_be_used_is_refused(timeout: Any) -> None:
    """A clear error before anything begins."""
    with pytest.raises(UsageError, match="timeout"):
        Options(timeout=timeout).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [("retry", 0), ("retry", True), ("retry", "3"), ("on_error", "skip"), ("rate_limit", 0), ("rate_limit", "fast")],
)
def test_a_policy_that_can_not_be_used_is_refused_by_the_run(name: str, value: Any) -> None:
    """A clear error that names the argument, before anything begins."""
    with pytest.raises(UsageError, match=r"retry|attempts|on_error|rate_limit|per_second"):
        Options(**{name: value}).check()


def test_a_function_that_has_to_be_awaited_can_not_say_what_is_worth_it() -> None:
    """An async def would always say yes."""

    async def on(error: BaseException) -> bool:
        return True

    with pytest.raises(UsageError, match="on= of Retry is an async def"):
        Options(retry=Retry(on=on)).check()


# Recorded failures


def test_a_recorded_failure_takes_its_items_place() -> None:
    """The output has one line an item, in order; the summary counts the failures."""
    service = Service(30, always(0, 7, 29))
    summary = service.run(on_error="record")
    assert summary.failed == 3
    assert [line["index"] for line in service.output] == list(range(30))
    assert [line["index"] for line in service.output if "error" in line] == [0, 7, 29]


def test_recorded_failures_are_counted_right_over_crashes() -> None:
    """Those below the mark, those ahead of it, and those of this run: the sum is the same however often it dies."""
    bad = (0, 3, 4, 11, 19)
    for moment in (1.1, 2, 3, 5, 8):
        service = Service(20, always(*bad), latency=1.0)
        lives = 0
        while service.store.published is None:
            lives += 1
            assert lives < 40
            if not kill_at(service, moment, on_error="record", checkpoint_interval=0.05, concurrency=3):
                break
        assert [line["index"] for line in service.output if "error" in line] == list(bad)
        assert all(commit.failed == sum(index < commit.mark for index in bad) for commit in service.store.commits)


@pytest.mark.parametrize("bound", [0, 3, "5%"])
def test_too_many_failures_end_the_job_and_everything_is_kept(bound: Any) -> None:
    """The error says how many; the same line with a higher bound goes on, with a lower one it ends at once."""
    service = Service(400, lambda index, attempt: ValueError("bad") if index % 10 == 0 else index)
    with pytest.raises(TooManyFailures, match=f"max_failures={bound}"):
        service.run(on_error=Record(max_failures=bound))
    done = len(service.attempts)
    with pytest.raises(TooManyFailures, match="higher bound"):
        service.run(on_error=Record(max_failures=bound))
    assert len(service.attempts) == done
    assert service.run(on_error=Record(max_failures="12%")).failed == 40
    assert len(service.attempts) == 400


def test_an_item_that_can_not_be_written_stops_the_job() -> None:
    """A failure needs its whole item in the output: without a JSON form there is no faithful record."""

    async def worker(item: object) -> None:
        raise ValueError("bad")

    source = IterableSource([object()], key=lambda item: 1)
    with pytest.raises(ItemFailed, match="can not be written as JSON"):
        run_virtual(to_its_end(Run(worker, source, MemoryLedger(Store()), Options(on_error="record"))))


# Pauses


def test_a_pause_holds_all_workers_and_spends_no_attempt() -> None:
    """While it lasts no attempt begins; afterwards they come back one by one, and the item comes again."""
    asked: list[float] = []

    def answer(index: int, attempt: int) -> Any:
        if index in (5, 40) and attempt == 1:
            asked.append(service.attempts[-1][0] + 1.0)
            return SlowDown(60)
        return index

    service = Service(80, answer, latency=1.0)
    summary = service.run(concurrency=10, retry=Retry(attempts=1))
    assert summary.failed == 0
    assert service.tries_of(5) == service.tries_of(40) == 2
    for index in (5, 40):
        paused_at = next(moment for moment, item in service.attempts if item == index) + 1.0
        after = [moment for moment, _ in service.attempts if moment > paused_at]
        assert min(after) >= paused_at + 60
        assert len(set(after[:10])) == 10, "they come back in one wave"
        assert after[9] - after[0] < 40


def test_a_longer_pause_prolongs_the_one_that_is_on_and_a_shorter_one_does_not_end_it() -> None:
    """The latest end of all that was asked for counts."""
    answers = {0: SlowDown(30), 1: SlowDown(100), 2: SlowDown(5)}
    service = Service(9, lambda index, attempt: answers.get(index, index) if attempt == 1 else index)
    service.run(concurrency=3)
    assert sorted(moment for moment, _ in service.attempts)[3] >= 101


def test_a_pause_asked_for_in_a_task_group_is_one() -> None:
    """A group of nothing but `SlowDown` is the longest of them; with another error in it, it is a failure."""
    pause = BaseExceptionGroup("of the worker", [SlowDown(3), ExceptionGroup("inner", [SlowDown(70)])])
    mixed = ExceptionGroup("of the worker", [SlowDown(3), ValueError("bad")])
    service = Service(9, lambda index, attempt: {0: pause, 1: mixed}.get(index, index) if attempt == 1 else index)
    assert service.run(concurrency=2, on_error="record").failed == 1
    assert sorted(moment for moment, _ in service.attempts)[2] >= 71
    assert (service.tries_of(0), service.tries_of(1)) == (2, 1)


def test_a_pause_of_no_time_is_not_told_each_time(caplog: pytest.LogCaptureFixture) -> None:
    """`SlowDown(0)` is another turn for the item, and no event of the run."""
    service = Service(9, lambda index, attempt: SlowDown(0) if attempt < 20 else index)
    with caplog.at_level(logging.INFO):
        assert service.run().failed == 0
    assert "pause" not in caplog.text


def test_pauses_do_not_count_for_the_deadline_of_an_item() -> None:
    """The clock of the items stands still while the run pauses."""

    def answer(index: int, attempt: int) -> Any:
        if attempt == 1:
            return SlowDown(500) if index == 0 else ConnectionError()
        return index

    service = Service(4, answer)
    assert service.run(retry=Retry(deadline=30, initial=5), on_error="record").failed == 0


# Outages


def outage(begins: float, ends: float) -> Answer:
    """Every attempt that ends in that time fails."""

    def answer(index: int, attempt: int) -> Any:
        now = asyncio.get_running_loop().time()
        return ConnectionError("down") if begins <= now < ends else {"value": index}

    return answer


@pytest.mark.parametrize("ends", [30.0, 500.0, 5000.0])
def test_an_outage_costs_a_few_attempts_and_no_item(ends: float, caplog: pytest.LogCaptureFixture) -> None:
    """However long it lasts: the breaker's failures, what was in flight, and a probe now and then; said once each."""
    service = Service(2000, outage(20, ends), latency=1.0)
    with caplog.at_level(logging.WARNING, "async_recovery"):
        summary = service.run(concurrency=40, retry=Retry(attempts=3, initial=1, maximum=60), on_error="record")
    assert summary.failed == 0
    during = [moment for moment, _ in service.attempts if 20 <= moment < ends]
    probes = 8 + ends / 60
    assert len(during) <= 50 + 2 * 40 + probes
    assert max(service.tries_of(index) for index in range(2000)) <= 4
    assert sum("in a row" in line for line in caplog.messages) == 1
    assert sum("the outage is over" in line for line in caplog.messages) == 1


def test_probes_take_items_that_have_not_failed_yet() -> None:
    """One after the other, each another one."""
    service = Service(300, outage(0, 4000), latency=1.0)
    service.run(concurrency=10, retry=Retry(attempts=5, initial=1, maximum=60, breaker=20))
    probes = [index for moment, index in service.attempts if 100 < moment < 4000]
    assert len(probes) > 20
    assert len(set(probes)) == len(probes)
    assert len(service.output) == 300


def test_items_that_fail_by_themselves_at_the_end_do_not_keep_the_job() -> None:
    """When all that is left has failed before, there is nothing to probe with: the attempts count, and the job ends."""
    service = Service(300, lambda index, attempt: ValueError("bad") if index >= 100 else index)
    summary = service.run(concurrency=20, retry=Retry(attempts=4, initial=1, maximum=2), on_error="record")
    assert summary.failed == 200
    assert all(service.tries_of(index) <= 5 for index in range(100, 300))


def test_a_probe_that_fails_for_good_is_no_answer() -> None:
    """A failure that is not worth another attempt says nothing of the outage: the next item is tried."""

    def answer(index: int, attempt: int) -> Any:
        if index % 2:
            return ValueError("bad by itself")
        return ConnectionError("down") if asyncio.get_running_loop().time() < 300 else index

    service = Service(200, answer)
    summary = service.run(concurrency=10, retry=Retry(on=OSError, breaker=10, attempts=3), on_error="record")
    assert summary.failed == 100
    assert [line["index"] for line in service.output if "error" in line] == list(range(1, 200, 2))


def test_what_succeeds_late_does_not_end_an_outage() -> None:
    """Requests that were under way when it began succeed one after the other, while all new ones fail at once."""
    service = Service(4000, lambda index, attempt: index)

    async def worker(index: int) -> int:
        now = asyncio.get_running_loop().time()
        service.attempts.append((now, index))
        if 60 <= now < 600:
            await asyncio.sleep(0.1)
            raise ConnectionError("down")
        await asyncio.sleep(1 + index % 30 if now < 60 else 1)
        return index

    service.worker = worker  # type: ignore[method-assign]
    assert service.run(concurrency=200, retry=Retry(), on_error="record").failed == 0
    assert sum(60 <= moment < 600 for moment, _ in service.attempts) < 50 + 200 + 20


def test_items_that_fail_by_themselves_are_no_outage_when_they_come_all_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a pause the next attempts of all of them are due: that they fail in a row, once more, is no news."""

    def answer(index: int, attempt: int) -> Any:
        if index % 100 == 0:
            return ValueError("bad")
        return SlowDown(60) if (index, attempt) == (3050, 1) else index

    service = Service(6000, answer)
    retry = Retry(attempts=5, initial=30, maximum=60, breaker=20)
    with caplog.at_level(logging.WARNING, "async_recovery"):
        assert service.run(concurrency=50, retry=retry, on_error="record").failed == 60
    assert not [line for line in caplog.messages if "in a row" in line]
    assert {service.tries_of(index) for index in range(0, 6000, 100)} == {5}


def test_items_that_failed_in_an_earlier_run_are_no_outage() -> None:
    """A resume whose first items have all failed before tries them again at once; none of them is a probe."""
    service = Service(1000, always(*range(0, 1000, 5)))
    retry = Retry(attempts=4, initial=300, maximum=300)
    options: dict[str, Any] = {"retry": retry, "on_error": "record", "concurrency": 50}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("random.random", lambda: 1.0)
        assert kill_at(service, 100, **options)
    assert len(service.store.spent) == 200
    assert service.run(**options).failed == 200
    assert service.attempts[-1][0] < 3 * 300
    assert {service.tries_of(index) for index in range(0, 1000, 5)} == {4}


@pytest.mark.parametrize("concurrency", [10, 100])
@pytest.mark.parametrize("on_error", ["stop", "record"])
def test_an_outage_stays_one_over_any_number_of_kills(on_error: Any, concurrency: int) -> None:
    """Each start tries single items: none fails for good, however often the process is killed in its middle."""
    service = Service(3000, lambda index, attempt: ConnectionError("away"), latency=0.01)
    retry = Retry(attempts=3, initial=0.5)
    options: dict[str, Any] = {"retry": retry, "on_error": on_error, "concurrency": concurrency}
    for _ in range(6):
        assert kill_at(service, 6, checkpoint_interval=0.1, **options)
    assert len(service.attempts) <= 50 + 2 * concurrency + 6 * 10  # and a few probes in each life
    service._answer = lambda index, attempt: index
    summary = service.run(**options)
    assert (summary.failed, summary.processed) == (0, 3000)


def test_probes_are_not_taken_from_what_failed_in_an_earlier_run() -> None:
    """Those that failed then wait for the end of an outage; the first item that did not is the probe."""
    service = Service(600, outage(0, 500))
    options: dict[str, Any] = {"on_error": "record", "checkpoint_interval": 0.5}
    assert kill_at(service, 1.7, concurrency=200, retry=Retry(initial=300, breaker=None), **options)
    service.store.spent = spent = {index: service.store.spent[index] for index in range(60, 200)}
    service.attempts.clear()
    assert service.run(concurrency=50, retry=Retry(initial=1), **options).failed == 0
    probes = [index for moment, index in service.attempts if 2 < moment < 500]
    assert len(probes) > 10
    assert not spent.keys() & set(probes)


def test_one_in_a_hundred_that_always_fails_neither_pauses_nor_slows_the_job() -> None:
    """The others go on at full concurrency until the last item is handed out; then it ends by itself."""
    times = {}
    for bad in (0, 1):
        service = Service(5000, lambda index, attempt, bad=bad: ValueError("bad") if index % 100 < bad else index)  # type: ignore[misc]
        summary = service.run(concurrency=50, retry=Retry(attempts=5, initial=0.5, maximum=4), on_error="record")
        assert summary.failed == 50 * bad
        last = next(n for n, (_, index) in enumerate(service.attempts) if index == 4999)
        times[bad] = service.attempts[last][0] / last
    assert times[1] <= times[0] * 1.02


# The rate


@pytest.mark.parametrize("per_second", [3, 20, RateLimit(per_second=20, burst=20), 0.5])
def test_no_second_of_a_run_or_its_resume_begins_more_than_the_rate(per_second: Any) -> None:
    """Measured where the worker is called, from the first second on, and over a kill and the start after it."""
    rate = per_second.per_second if isinstance(per_second, RateLimit) else per_second
    service = Service(60, lambda index, attempt: index, latency=0.3)
    kill_at(service, 1.4, rate_limit=per_second, concurrency=30, checkpoint_interval=0.2)
    before = [moment for moment, _ in service.attempts]
    service.attempts.clear()
    service.run(rate_limit=per_second, concurrency=30)
    begun = before + [1.4 + moment for moment, _ in service.attempts]
    span = max(1.0, 1 / rate)
    assert max(sum(start <= moment < start + span - 1e-9 for moment in begun) for start in begun) <= max(1, rate)
    if rate < 60:
        assert service.attempts[-1][0] <= (len(service.attempts) + 1) / rate + span + 1


def test_a_rate_limit_counts_plain_functions_where_they_begin() -> None:
    """They begin in threads, later than they were handed out: here up to 0.9 s, each another time."""
    began: list[float] = []

    def worker(item: int) -> int:
        began.append(loop[0].now)
        return item

    async def main() -> None:
        running = asyncio.get_running_loop()
        assert isinstance(running, VirtualLoop)
        loop.append(running)
        in_thread, dice = anyio.to_thread.run_sync, random.Random(1)

        async def late(*args: Any, **options: Any) -> Any:
            await asyncio.sleep(dice.uniform(0, 0.9))
            return await in_thread(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(anyio.to_thread, "run_sync", late)
            options = Options(concurrency=8, rate_limit=5)
            await to_its_end(Run(worker, IterableSource(range(30)), MemoryLedger(Store()), options))

    loop: list[VirtualLoop] = []
    run_threaded(main())
    assert max(sum(start <= moment < start + 1 for moment in began) for start in began) <= 5
    assert len(began) == 30


# What is seen of it


def test_progress_tells_of_failures_retries_waits_and_pauses() -> None:
    """While the mark stands still: the item that holds it, and at which attempt."""
    seen: list[Progress] = []

    def answer(index: int, attempt: int) -> Any:
        if index == 3 and attempt < 4:
            return ConnectionError()
        if index == 8:
            return ValueError("bad")
        return SlowDown(20) if (index, attempt) == (9, 1) else index

    service = Service(12, answer)
    retry = Retry(attempts=4, initial=30, maximum=30, on=lambda error: isinstance(error, ConnectionError))
    service.run(retry=retry, on_error="record", on_progress=seen.append)
    assert max(progress.failed for progress in seen) == 1
    assert seen[-1].retries == 3
    assert any(progress.waiting == 1 and progress.held_by == 3 and progress.held_attempt > 1 for progress in seen)
    assert any(progress.paused and "pause" in progress.paused for progress in seen)
    assert all(progress.failed <= progress.finished for progress in seen)


def test_an_item_that_holds_the_mark_is_named_after_a_minute_and_then_ever_more_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With its attempt, and with what waits behind it."""
    service = Service(500, lambda index, attempt: ConnectionError() if (index, attempt) == (7, 1) else index)
    service.slow[7] = 2000.0
    with caplog.at_level(logging.WARNING, "async_recovery"):
        service.run(retry=2, limits=Limits(window=300))
    said = [line for line in caplog.messages if "holds the mark" in line]
    assert said[0].startswith("item 7 holds the mark for 60 s, at attempt 1: ")
    assert [line.split(" for ")[1].split(",")[0] for line in said] == ["60 s", "240 s", "960 s", "3840 s"]
    assert "at attempt 2" in said[-1]
    assert "299 finished items wait behind it, 0 more may begin" in said[-1]
