"""One contract for every ledger: what a run leaves there is what the next run finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_recovery import (
    AlreadyRunning,
    FileLedger,
    InputChanged,
    ItemFailed,
    JobMismatch,
    Ledger,
    SqliteLedger,
    run_resumable,
)
from async_recovery.checkpoint import Ahead, Bookmark, Checkpoint, Commit, Job
from async_recovery.contracts import RunSummary
from async_recovery.errors import AsyncRecoveryError
from async_recovery.progress import Progress

from .support.memory_ledger import MemoryLedger, Store
from .support.virtual_loop import at_round, run_virtual

JOB = Job("iterable", "tests:worker", None, "jsonl")
RECORDS = [b'{"index":%d}' % index for index in range(6)]
SUMMARY = RunSummary(
    total_items=6,
    processed=6,
    checkpoint_cleared=True,
    resumed_from=0,
    executed=6,
    failed=0,
    elapsed_s=1.0,
    output="out",
)

Maker = Callable[..., Ledger]


@pytest.fixture(params=["memory", "file", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """Makes ledgers over one and the same place."""
    store = Store()

    def memory(**options: Any) -> Ledger:
        return MemoryLedger(store, **options)

    def file(**options: Any) -> Ledger:
        return FileLedger(tmp_path / "out.jsonl", **options)

    def sqlite(**options: Any) -> Ledger:
        return SqliteLedger(tmp_path / "out.db", **options)

    makers: dict[str, Maker] = {"memory": memory, "file": file, "sqlite": sqlite}
    return makers[request.param]


def commit(generation: int, mark: int, records: list[int], ahead: list[int]) -> Commit:
    """A commit of the records of these indices."""
    return Commit(
        generation=generation,
        mark=mark,
        window=10,
        bookmark=Bookmark({"offset": mark}, mark, mark * 7),
        records=[RECORDS[index] for index in records],
        ahead=[Ahead(index, index * 11, RECORDS[index]) for index in ahead],
        failed=0,
    )


async def reopened(make: Maker, job: Job = JOB) -> Checkpoint:
    """What another run finds."""
    ledger = make()
    try:
        return await ledger.open(job)
    finally:
        await ledger.close()


async def test_a_fresh_place_holds_nothing(make: Maker) -> None:
    """Opening and closing leaves no trace."""
    assert await reopened(make) == Checkpoint()
    assert await reopened(make) == Checkpoint()


async def test_each_commit_is_found_by_the_next_run(make: Maker) -> None:
    """State and what is ahead come back as they were committed, and what the mark has passed is ahead no longer."""
    ledger = make()
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 0, [], [2, 3]))
    await ledger.close()
    found = await reopened(make)
    assert found.state is not None
    assert (found.state.mark, found.state.generation, found.state.source) == (0, 2, Bookmark({"offset": 0}, 0, 0))
    assert found.ahead == {index: Ahead(index, index * 11, RECORDS[index]) for index in (2, 3)}
    ledger = make()
    assert await ledger.open(JOB) == found
    await ledger.commit(commit(3, 3, [0, 1, 2], [5]))
    await ledger.close()
    found = await reopened(make)
    assert found.state is not None
    assert found.state.mark == 3
    assert list(found.ahead) == [3, 5]


async def test_a_finished_job_starts_anew(make: Maker) -> None:
    """After the finish nothing is left, unless it was asked for."""
    ledger = make()
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 6, list(range(6)), []))
    await ledger.finish(Bookmark(None, 6, 1), SUMMARY)
    await ledger.close()
    assert await reopened(make) == Checkpoint()


async def test_a_kept_checkpoint_tells_that_the_job_is_complete(make: Maker) -> None:
    """With keep_checkpoint the summary is found; without it the job starts anew."""
    ledger = make(keep_checkpoint=True)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 6, list(range(6)), []))
    await ledger.finish(Bookmark(None, 6, 1), SUMMARY)
    await ledger.close()
    again = make(keep_checkpoint=True)
    found = await again.open(JOB)
    await again.close()
    assert found.complete is not None
    assert found.kept
    assert found.complete.summary["total_items"] == 6
    assert found.complete.source == Bookmark(None, 6, 1)
    assert await reopened(make) == Checkpoint()


async def test_one_run_at_a_time(make: Maker) -> None:
    """The second of two is refused while the first is open, and welcome afterwards."""
    first, second = make(), make()
    await first.open(JOB)
    with pytest.raises(AlreadyRunning):
        await second.open(JOB)
    await second.close()
    await first.commit(commit(1, 0, [], []))
    await first.commit(commit(2, 1, [0], []))
    await first.close()
    assert (await reopened(make)).state is not None


async def test_another_job_is_refused(make: Maker) -> None:
    """A checkpoint is only for the job that left it."""
    ledger = make()
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 0, [], [3]))
    await ledger.close()
    with pytest.raises(JobMismatch):
        await reopened(make, Job("iterable", "tests:other", None, "jsonl"))
    assert (await reopened(make)).state is not None


async def test_showing_progress_and_auditing_change_nothing(make: Maker) -> None:
    """Both can be called at any time between open and close."""
    ledger = make()
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 1, [0], []))
    await ledger.show(Progress(1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, None, 0.0, None, None))
    await ledger.audit()
    await ledger.close()
    await ledger.close()
    found = await reopened(make)
    assert found.state is not None
    assert found.state.generation == 2


async def _echo(item: int) -> int:
    await asyncio.sleep(0.2)
    return item


# What anyio leaves of a task that is cancelled before its first turn.
@pytest.mark.filterwarnings(r"ignore:coroutine 'Run\._(audit|work)' was never awaited")
@pytest.mark.parametrize("torn_down", [False, True])
def test_a_cancellation_at_any_round_of_the_file_ledger_loses_nothing(tmp_path: Path, *, torn_down: bool) -> None:
    """Cancelled, or torn down with its loop, at any round of the loop, the next run gives the same bytes."""
    expected = b"".join(b'{"index":%d,"result":%d}\n' % (index, index) for index in range(6))
    step, cancelled = 1, 0
    while True:
        output = tmp_path / f"{step}.jsonl"
        ran: list[int] = []

        async def worker(item: int, ran: list[int] = ran) -> int:
            ran.append(item)
            return await _echo(item)

        def job(output: Path = output, worker: Any = worker) -> Any:
            return run_resumable(
                worker, range(6), output=output, concurrency=2, checkpoint_interval=0.1, drain_timeout=0
            )

        async def main(job: Any = job, step: int = step) -> None:
            task = asyncio.ensure_future(job())
            reached = asyncio.get_running_loop().create_future()
            at_round(step, reached.cancel)
            await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
            if reached.done() and not torn_down:
                task.cancel()
                await task
            elif reached.done():  # the loop's runner cancels every task
                raise asyncio.CancelledError

        try:
            run_virtual(main())
        except asyncio.CancelledError:
            cancelled += 1
            finished_before = asyncio.run(_committed(output))
            del ran[:]
            if not output.exists():
                run_virtual(job())
            assert not finished_before & set(ran)
        else:
            break
        assert output.read_bytes() == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{n}.jsonl" for n in range(1, step + 1))
        step += 1
    assert cancelled > 20


async def _committed(output: Path) -> set[int]:
    ledger = FileLedger(output)
    job = Job(
        "iterable",
        f"{__name__}:test_a_cancellation_at_any_round_of_the_file_ledger_loses_nothing.<locals>.worker",
        None,
        "jsonl",
    )
    try:
        found = await ledger.open(job)
    except (AsyncRecoveryError, InputChanged):
        raise AssertionError("a cancelled run left something that can not be resumed") from None
    finally:
        await ledger.close()
    return set(found.ahead) | set(range(found.state.mark if found.state else 0))


async def test_a_job_of_which_nothing_is_done_leaves_nothing(tmp_path: Path) -> None:
    """A worker that fails on its first item costs nothing: mended, under any name, it starts anew."""
    output = tmp_path / "new" / "folder" / "out.jsonl"

    async def wrong(item: int) -> int:
        raise NameError("typo")

    with pytest.raises(ItemFailed, match="typo"):
        await run_resumable(wrong, range(5), output=output, concurrency=2)
    assert list(tmp_path.iterdir()) == []
    summary = await run_resumable(_echo, range(5), output=output)
    assert summary.executed == 5


async def test_what_was_done_stays_when_the_next_item_fails(tmp_path: Path) -> None:
    """One committed item is enough to keep the checkpoint, and the next run does not repeat it."""
    output = tmp_path / "out.jsonl"
    ran = []

    async def worker(item: int) -> int:
        ran.append(item)
        if item == 1 and ran.count(1) == 1:
            raise ConnectionError
        return item

    with pytest.raises(ItemFailed):
        await run_resumable(worker, range(3), output=output, concurrency=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.checkpoint", "out.jsonl.partial"]
    await run_resumable(worker, range(3), output=output, concurrency=1)
    assert ran == [0, 1, 1, 2]
