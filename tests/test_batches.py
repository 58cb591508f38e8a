"""Records that the program takes itself, in batches: in order, each once, and the last one again after a crash."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from async_recovery import (
    InputChanged,
    ItemFailed,
    JobMismatch,
    Limits,
    Record,
    Stopped,
    UsageError,
    resumable,
    run_resumable,
)
from async_recovery.consumer import BATCH_BYTES, BATCH_RECORDS, Consumer

from .support.file_jobs import replay_of
from .support.virtual_loop import run_virtual


class Job:
    """Runs of one job whose program keeps what it takes.

    :ivar taken: the indices of all records that it was given, in order, over all lives.
    :ivar ran: the items that ran, in order.
    """

    def __init__(self, folder: Path, count: int, **arguments: Any) -> None:
        self.checkpoint = folder / "job.checkpoint"
        self.count = count
        self.arguments = {"concurrency": 5, "checkpoint_interval": 0.5, **arguments}
        self.taken: list[int] = []
        self.ran: list[int] = []

    async def worker(self, item: int) -> dict[str, int]:
        self.ran.append(item)
        await asyncio.sleep((item * 7 % 5) * 0.3)
        return {"value": item * 10}

    async def live(self, *, batches: int | None = None, slowly_s: float = 0.0) -> resumable:
        """One life; after so many batches the program ends as if it had failed, with the last one not acknowledged."""
        async with resumable(self.worker, range(self.count), checkpoint=self.checkpoint, **self.arguments) as run:
            number = 0
            async for batch in run.batches():
                records = [json.loads(record) for record in batch]
                assert all(record == {"index": record["index"], "value": record["index"] * 10} for record in records)
                self.taken += [record["index"] for record in records]
                number += 1
                await asyncio.sleep(slowly_s)
                if number == batches:
                    raise Crash
        return run


class Crash(Exception):
    """The program's own."""


def test_every_record_comes_once_and_in_order(tmp_path: Path) -> None:
    """All of them, and then the checkpoint is gone."""
    job = Job(tmp_path, 300)
    run = run_virtual(job.live())
    assert job.taken == list(range(300))
    assert run.summary.processed == 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_after_a_failure_the_batch_that_was_not_acknowledged_comes_again(tmp_path: Path, batches: int) -> None:
    """That one alone, from its beginning; and no item runs again that had finished."""
    job = Job(tmp_path, 120)
    boundaries = []
    for _ in range(2):
        before = len(job.taken)
        with pytest.raises(Crash):
            run_virtual(job.live(batches=batches))
        boundaries.append((before, len(job.taken)))
    run_virtual(job.live())
    assert sorted(set(job.taken)) == list(range(120))
    for before, after in boundaries:
        life, following = job.taken[before:after], job.taken[after:]
        assert life == list(range(life[0], life[0] + len(life)))
        assert following[0] in life, "a batch was not given again"
    assert len(job.ran) == 120, "what had finished ran again"


def test_a_file_that_ends_before_its_records_are_taken(tmp_path: Path) -> None:
    """The empty page at the end of a file comes when all items are done, and none of their records is taken."""
    path = tmp_path / "items"
    path.write_text("".join(f"{number}\n" for number in range(3_000)))
    taken: list[int] = []

    async def worker(item: str) -> int:
        return int(item)

    async def main(batches: int) -> None:
        async with resumable(worker, path, checkpoint=tmp_path / "job", concurrency=50) as run:
            async for batch in run.batches():
                taken.extend(json.loads(record)["result"] for record in batch)
                if len(taken) == 1_000 * batches:
                    raise Crash

    with pytest.raises(Crash):
        run_virtual(main(2))
    assert taken == list(range(2_000))
    run_virtual(main(0))
    assert taken[2_000:] == list(range(1_000, 3_000))
    assert list(tmp_path.iterdir()) == [path]


def test_a_resume_with_nothing_left_to_run_gives_what_was_not_taken(tmp_path: Path) -> None:
    """All items are done, and no record is acknowledged: the next life gives them all, and runs none."""
    job = Job(tmp_path, 100)
    with pytest.raises(Crash):
        run_virtual(job.live(batches=1, slowly_s=100.0))
    replay = replay_of(job.checkpoint)
    assert replay.state is not None
    assert replay.state.mark + len(replay.ahead) == 100
    job.taken.clear()
    run_virtual(job.live())
    assert job.taken == list(range(replay.state.mark, 100))
    assert len(job.ran) == 100


def test_what_has_finished_and_was_not_taken_is_in_the_journal(tmp_path: Path) -> None:
    """The mark is what was acknowledged; the rest is ahead of it, with its records."""
    job = Job(tmp_path, 100)
    with pytest.raises(Crash):
        run_virtual(job.live(batches=2, slowly_s=100.0))
    replay = replay_of(job.checkpoint)
    assert replay.state is not None
    acknowledged = replay.state.mark
    assert 0 < acknowledged < len(job.taken)
    assert sorted(replay.ahead) == list(range(acknowledged, 100))
    assert [json.loads(item.record or b"")["index"] for item in replay.ahead.values()] == sorted(replay.ahead)


def test_a_program_that_does_not_ask_stops_the_intake_at_the_window(tmp_path: Path) -> None:
    """Memory stays bounded by the window, in items and in bytes; and it goes on when the program does."""
    job = Job(tmp_path, 400, limits=Limits(window=40))
    seen = []

    async def main() -> None:
        async with resumable(job.worker, range(400), checkpoint=job.checkpoint, **job.arguments) as run:
            batches = run.batches()
            job.taken += [json.loads(record)["index"] for record in await anext(batches)]
            await asyncio.sleep(1000)
            seen.append((len(job.ran), run.progress.commits))
            async for batch in batches:
                job.taken += [json.loads(record)["index"] for record in batch]

    run_virtual(main())
    ((begun, commits),) = seen
    assert begun == 40
    assert commits < 40, "a storm of commits with nothing new"
    assert job.taken == list(range(400))


def test_the_byte_bound_counts_what_the_program_has_not_taken(tmp_path: Path) -> None:
    """It stops the intake as well, and does not deadlock."""
    job = Job(tmp_path, 200, limits=Limits(max_buffer_bytes=300))
    run_virtual(job.live(slowly_s=20.0))
    assert job.taken == list(range(200))


def test_recorded_failures_come_in_their_places(tmp_path: Path) -> None:
    """A record like the others."""

    async def worker(item: int) -> int:
        if item == 3:
            raise ValueError("bad")
        return item

    async def main() -> list[Any]:
        arguments: dict[str, Any] = {"checkpoint": tmp_path / "c", "on_error": Record(max_failures=1)}
        async with resumable(worker, range(6), **arguments) as run:
            records = [json.loads(record) async for batch in run.batches() for record in batch]
        assert run.summary.failed == 1
        return records

    records = run_virtual(main())
    assert records[3] == {"index": 3, "error": {"type": "ValueError", "message": "bad"}, "item": 3}
    assert [record["index"] for record in records] == list(range(6))


def test_the_error_of_the_run_is_raised_where_the_program_waits(tmp_path: Path) -> None:
    """The loop over the batches does not end as if that were all."""

    async def worker(item: int) -> int:
        await asyncio.sleep(1)
        if item == 3:
            raise ValueError("bad")
        return item

    reached = []

    async def main() -> None:
        async with resumable(worker, range(6), checkpoint=tmp_path / "c", concurrency=1) as run:
            async for batch in run.batches():
                reached.append(len(batch))
            reached.append(-1)

    with pytest.raises(ItemFailed, match="bad"):
        run_virtual(main())
    assert -1 not in reached


def test_a_stop_ends_the_batches_with_stopped(tmp_path: Path) -> None:
    """What has finished is committed, and the same call goes on."""
    job = Job(tmp_path, 100)

    async def main() -> None:
        async with resumable(job.worker, range(100), checkpoint=job.checkpoint, **job.arguments) as run:
            async for batch in run.batches():
                job.taken += [json.loads(record)["index"] for record in batch]
                if len(job.taken) > 30:
                    run.stop()

    with pytest.raises(Stopped, match=r"with 0 items finished ahead of it"):
        run_virtual(main())
    run_virtual(job.live())
    assert job.taken == list(range(100)), "what is taken while the run stops does not come again"
    assert len(job.ran) == 100


@pytest.mark.parametrize("slowly_s", [2.9, 3.1])
def test_a_stop_waits_for_who_takes_the_batches_as_long_as_for_the_worker(tmp_path: Path, slowly_s: float) -> None:
    """A batch that is taken within `drain_timeout` is acknowledged, one that takes longer comes again."""
    job = Job(tmp_path, 10, drain_timeout=3.0, checkpoint_interval=600, concurrency=10)

    async def main() -> float:
        async with resumable(job.worker, range(10), checkpoint=job.checkpoint, **job.arguments) as run:
            async for batch in run.batches():
                job.taken += [json.loads(record)["index"] for record in batch]
                run.stop()
                await asyncio.sleep(slowly_s)
        return run.summary.processed

    if slowly_s < 3:
        assert run_virtual(main()) == 10
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(Stopped, match="stopped at the mark 0, with 10 items finished ahead of it"):
            run_virtual(main())
        run_virtual(job.live())
        assert job.taken == [*range(10), *range(10)]


def test_another_task_may_take_the_batches(tmp_path: Path) -> None:
    """If it is started at once."""
    job = Job(tmp_path, 50)

    async def take(run: resumable) -> None:
        async for batch in run.batches():
            job.taken += [json.loads(record)["index"] for record in batch]

    async def main() -> None:
        async with resumable(job.worker, range(50), checkpoint=job.checkpoint) as run:
            await asyncio.create_task(take(run))

    run_virtual(main())
    assert job.taken == list(range(50))


def test_batches_are_refused_where_the_records_go_elsewhere(tmp_path: Path) -> None:
    """To an output, or nowhere because the run has begun without anybody to take them."""

    async def with_output() -> None:
        async with resumable(Job(tmp_path, 3).worker, range(3), output=tmp_path / "out.jsonl") as run:
            run.batches()

    async def too_late() -> None:
        async with resumable(Job(tmp_path, 3).worker, range(3), checkpoint=tmp_path / "c") as run:
            await asyncio.sleep(1)
            run.batches()

    with pytest.raises(UsageError, match="leave output= away"):
        run_virtual(with_output())
    with pytest.raises(UsageError, match="at once"):
        run_virtual(too_late())


def test_a_job_of_side_effects_is_not_resumed_as_one_of_batches(tmp_path: Path) -> None:
    """Its journal has no records: refused, as any other job; and so is a changed input."""
    job = Job(tmp_path, 100)
    with pytest.raises(Crash):
        run_virtual(job.live(batches=1))
    with pytest.raises(JobMismatch):
        run_virtual(run_resumable(job.worker, range(100), checkpoint=job.checkpoint))
    with pytest.raises(InputChanged):
        run_virtual(run_batches(job, [*range(1, 101)]))


async def run_batches(job: Job, items: list[int]) -> None:
    async with resumable(job.worker, items, checkpoint=job.checkpoint) as run:
        async for _ in run.batches():
            pass


@pytest.mark.parametrize("size", [10, BATCH_BYTES // 3, BATCH_BYTES + 1])
def test_a_batch_is_bounded_in_records_and_bytes(size: int) -> None:
    """At most 1,000 records and 4 MiB, but always one."""
    consumer, records = Consumer(), [b"x" * size] * 1500 if size == 10 else [b"x" * size] * 7
    consumer.release(records, {})
    sizes = []
    while batch := consumer.next_batch():
        sizes.append(len(batch))
        assert consumer.acknowledge()
    assert sum(sizes) == len(records)
    assert max(sizes) == min(BATCH_RECORDS, max(1, BATCH_BYTES // size))
    assert not consumer.acknowledge()


def test_a_block_that_ends_before_the_last_batch_stops_the_run(tmp_path: Path) -> None:
    """Nobody would take the rest: `Stopped`, with everything that finished kept."""
    job = Job(tmp_path, 60)

    async def main() -> None:
        async with resumable(job.worker, range(60), checkpoint=job.checkpoint, **job.arguments) as run:
            async for batch in run.batches():
                job.taken += [json.loads(record)["index"] for record in batch]
                break

    with pytest.raises(Stopped):
        run_virtual(main())
    assert job.checkpoint.exists()
    job.taken.clear()
    run_virtual(job.live())
    assert job.taken == list(range(60))
