"""The contract of a `Ledger`: what a run leaves there is what the next run finds."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec

from ..calls import run_resumable
from ..checkpoint import Ahead, Bookmark, Checkpoint, Commit, Job, Spent
from ..contracts import Ledger, RunSummary
from ..errors import AlreadyRunning, ItemFailed, JobMismatch, OutputChanged, StorageFailed
from ..progress import NOT_BEGUN
from .expectations import expect, expect_error, expect_true, on_a_loop

COUNT = 6
RECORDS = [msgspec.json.encode({"index": index, "text": f"é\n\0{index}'\"\\"}) for index in range(COUNT)]
SUMMARY = RunSummary(
    total_items=COUNT,
    processed=COUNT,
    checkpoint_cleared=True,
    resumed_from=0,
    executed=COUNT,
    failed=0,
    elapsed_s=1.0,
    output="out",
)


class LedgerContract:
    """What every ledger must hold. Each test begins with a place in which nothing is.

    :cvar can_keep: whether `make` takes ``keep_checkpoint=True``.
    :cvar can_change: whether `change` changes what was written; `can_fail`: whether writes fail within `failing`.
    """

    can_keep = True
    can_change = False
    can_fail = False

    @abstractmethod
    def make(self, **options: Any) -> Ledger:
        """A new ledger, over one and the same place within a test.

        :param options: nothing, or ``keep_checkpoint=True``.
        """

    @abstractmethod
    async def published(self) -> list[bytes] | None:
        """The records of the last complete run as a reader sees them, in order; None or none if there is none."""

    def change(self) -> None:
        """Change the record of index 0 in the run that is not complete, or take it away, behind the ledger's back."""

    def failing(self) -> AbstractContextManager[object]:
        """While it lasts, a commit with records can not be written; afterwards it could."""
        return nullcontext()

    @on_a_loop
    async def test_it_is_a_ledger(self) -> None:
        """It has all methods and attributes of a `Ledger`, and its form is one word."""
        ledger = self.make()
        expect_true(isinstance(ledger, Ledger), "it has all that a Ledger has")
        expect(ledger.form.split(), [ledger.form], "its form is one word")
        expect_true(not ledger.keeps_checkpoint, "nothing is kept that was not asked for")
        await ledger.close()

    @on_a_loop
    async def test_a_fresh_place_holds_nothing(self) -> None:
        """Opening and closing leaves no trace, and neither does closing what was never opened."""
        await self.make().close()
        for _ in range(2):
            expect(await self.left(), Checkpoint(), "opening finds nothing, and leaves nothing")

    @on_a_loop
    async def test_a_job_of_which_nothing_is_done_can_be_resumed_or_is_forgotten(self) -> None:
        """The first commit has the mark 0; a ledger that goes no further may leave it, or nothing."""
        await self.commit_all(commit(1, 0, [], []))
        found = await self.left()
        expect(found.complete, None, "nothing is complete")
        if found.state is not None:
            expect((found.state.mark, found.ahead), (0, {}), "nothing is done")

    @on_a_loop
    async def test_each_commit_is_found_by_the_next_run(self) -> None:
        """State and what is ahead come back as committed, and what the mark has passed is ahead no longer."""
        await self.commit_all(commit(1, 0, [], []), commit(2, 0, [], [2, 3]))
        found = await self.left()
        expect(state_of(found), (0, 2, 10, Bookmark({"offset": 0}, 0, 0), 0, False), "the state of the last commit")
        expect(found.ahead, {index: ahead(index) for index in (2, 3)}, "what is ahead")
        expect(await self.left(), found, "looking changes nothing")
        await self.commit_all(msgspec.structs.replace(commit(3, 3, [0, 1, 2], [5]), failed=1, ended=True))
        found = await self.left()
        expect(state_of(found), (3, 3, 10, Bookmark({"offset": 3}, 3, 21), 1, True), "the state of the last commit")
        expect(found.ahead, {index: ahead(index) for index in (3, 5)}, "what is ahead, in order")
        expect(list(found.ahead), [3, 5], "what is ahead is in the order of the indices")

    @on_a_loop
    async def test_spent_attempts_are_found_until_their_item_is_finished(self) -> None:
        """What was spent on items comes back as it was last said, for those that are neither passed nor ahead."""
        spent = [Spent(1, 2), Spent(2, 1, 1), Spent(4, 3), Spent(5, 1)]
        first = msgspec.structs.replace(commit(2, 1, [0], [3]), spent=spent)
        await self.commit_all(commit(1, 0, [], []), first)
        expect((await self.left()).spent, {item.index: item for item in spent}, "what was spent")
        news = [Spent(5, 0), Spent(4, 4)]
        await self.commit_all(msgspec.structs.replace(commit(3, 2, [1], [2]), spent=news))
        expect((await self.left()).spent, {4: Spent(4, 4)}, "what was spent on items that are not finished")

    @on_a_loop
    async def test_a_finished_job_is_published_and_starts_anew(self) -> None:
        """The records are there, in order, as they were committed; and a next run finds nothing."""
        await self.finish()
        expect(await self.published(), RECORDS, "the published records")
        expect(await self.left(), Checkpoint(), "nothing is left of a finished job")

    @on_a_loop
    async def test_nothing_is_published_before_the_finish(self) -> None:
        """A reader sees no record of a run that is not complete, and those of the last complete one until then."""
        await self.commit_all(commit(1, 0, [], []), commit(2, COUNT, list(range(COUNT)), []))
        expect(await self.published() or [], [], "what is published before the finish")
        await self.finish(begin_at=3)
        await self.commit_all(commit(1, 0, [], []), commit(2, 1, [0], [3]))
        expect(await self.published(), RECORDS, "what was published before")

    @on_a_loop
    async def test_no_items_are_a_complete_job_too(self) -> None:
        """A job without items is finished like any other."""
        ledger = await self.begun(commit(1, 0, [], []))
        nothing = msgspec.structs.replace(SUMMARY, total_items=0, processed=0, executed=0)
        await ledger.finish(Bookmark(None, 0, 0), nothing)
        await ledger.close()
        expect(await self.published() or [], [], "what is published")
        expect(await self.left(), Checkpoint(), "nothing is left of a finished job")

    @on_a_loop
    async def test_a_kept_checkpoint_tells_that_the_job_is_complete(self) -> None:
        """With keep_checkpoint the summary is found; without it the job starts anew."""
        if not self.can_keep:
            return
        await self.finish(keep_checkpoint=True)
        found = await self.left(keep_checkpoint=True)
        expect_true(found.kept, "it says that it was kept on purpose")
        complete = found.complete
        if complete is None:
            raise AssertionError("the job is complete, and a next run does not find that")
        expect(complete.summary["total_items"], COUNT, "the summary")
        expect(complete.source, Bookmark(None, COUNT, 1), "where the source ended")
        expect(await self.published(), RECORDS, "the published records")
        with expect_error(JobMismatch, "what is kept is of one job alone"):
            await self.left("tests:other", keep_checkpoint=True)
        expect(await self.left(), Checkpoint(), "without keep_checkpoint the job starts anew")

    @on_a_loop
    async def test_one_run_at_a_time(self) -> None:
        """The second of two is refused while the first is open, and welcome afterwards."""
        first, second = self.make(), self.make()
        await first.open(job_of(first))
        with expect_error(AlreadyRunning, "of two runs one is refused"):
            await second.open(job_of(second))
        await second.close()
        await first.commit(commit(1, 0, [], []))
        await first.commit(commit(2, 1, [0], []))
        await first.close()
        expect(state_of(await self.left())[:2], (1, 2), "mark and generation of the first")

    @on_a_loop
    async def test_another_job_is_refused(self) -> None:
        """A checkpoint is only for the job that left it; the refusal changes nothing."""
        await self.commit_all(commit(1, 0, [], []), commit(2, 0, [], [3]))
        before = await self.left()
        with expect_error(JobMismatch, "another job is refused"):
            await self.left("tests:other")
        expect(await self.left(), before, "what is left after another job was refused")

    @on_a_loop
    async def test_showing_progress_and_auditing_change_nothing(self) -> None:
        """Both can be called at any time between open and close, and close more than once."""
        ledger = self.make()
        await ledger.open(job_of(ledger))
        await ledger.show(NOT_BEGUN)
        await ledger.commit(commit(1, 0, [], []))
        await ledger.commit(commit(2, 1, [0], []))
        await ledger.show(NOT_BEGUN)
        await ledger.audit()
        await ledger.close()
        await ledger.close()
        again = self.make()
        found = await again.open(job_of(again))
        await again.audit()
        await again.close()
        expect(state_of(found)[:2], (1, 2), "mark and generation")

    @on_a_loop
    async def test_what_was_changed_is_found_by_the_next_run(self) -> None:
        """A record that is not there any more as it was committed: nothing goes on from it."""
        if not self.can_change:
            return
        await self.commit_all(commit(1, 0, [], []), commit(2, 2, [0, 1], []))
        self.change()
        ledger = self.make()
        with expect_error(OutputChanged, "a changed record is found by open or audit"):
            await ledger.open(job_of(ledger))
            await ledger.audit()
        await ledger.close()

    @on_a_loop
    async def test_what_was_changed_is_not_published(self) -> None:
        """A record that changes while the run goes on is found before anybody reads it."""
        if not self.can_change:
            return
        ledger = await self.begun(commit(1, 0, [], []), commit(2, COUNT, list(range(COUNT)), []))
        self.change()
        with expect_error(OutputChanged, "a changed record is found by finish"):
            await ledger.finish(Bookmark(None, COUNT, 1), SUMMARY)
        await ledger.close()
        expect(await self.published() or [], [], "what is published")

    @on_a_loop
    async def test_after_a_failed_commit_nothing_is_written(self) -> None:
        """It is told, and so is all that comes after it: nobody knows what the storage has kept of it."""
        if not self.can_fail:
            return
        ledger = await self.begun(commit(1, 0, [], []), commit(2, 1, [0], []))
        with self.failing(), expect_error(StorageFailed, "a commit that fails is told"):
            await ledger.commit(commit(3, 2, [1], []))
        with expect_error(StorageFailed, "after a failed commit there is no other"):
            await ledger.commit(commit(3, 2, [1], []))
        with expect_error(StorageFailed, "after a failed commit there is no finish"):
            await ledger.finish(Bookmark(None, 1, 1), SUMMARY)
        await ledger.close()
        expect(state_of(await self.left())[:2], (1, 2), "mark and generation before the failure")

    @on_a_loop
    async def test_a_cancelled_commit_is_there_or_not(self) -> None:
        """Cancelled at any of its first rounds of the loop, a commit is found whole or not at all."""
        await self.commit_all(commit(1, 0, [], []), commit(2, 1, [0], []))
        for generation in range(3, 9):
            ledger = self.make()
            before = await ledger.open(job_of(ledger))
            at = before.state.generation if before.state is not None else 0
            task = asyncio.ensure_future(ledger.commit(commit(at + 1, 1, [], [1 + at % 4])))
            for _ in range(generation - 3):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            await ledger.close()
            found = await self.left()
            there = {**before.ahead, 1 + at % 4: ahead(1 + at % 4)}
            whole = (at, before.ahead), (at + 1, dict(sorted(there.items())))
            what = (state_of(found)[1], found.ahead)
            expect_true(what in whole, f"a cancelled commit is there as a whole, or not at all: {what}")

    @on_a_loop
    async def test_a_run_that_is_interrupted_again_and_again_publishes_what_an_undisturbed_one_does(self) -> None:
        """Through `run_resumable` with items ahead: no committed item runs again, and each record is there once."""
        items, ran = 40, list[int]()

        async def worker(item: int) -> dict[str, int]:
            await asyncio.sleep(0.001 * (item % 7))
            if item % 10 == 9 and ran.count(item) == 0:
                ran.append(item)
                raise ConnectionError("once")
            ran.append(item)
            return {"n": item}

        for _ in range(20):
            try:
                await run_resumable(worker, range(items), output=self.make(), concurrency=4, checkpoint_interval=0)
            except ItemFailed:
                continue
            break
        expect(await self.published(), [b'{"index":%d,"n":%d}' % (n, n) for n in range(items)], "the records")
        again = {n for n in range(items) if ran.count(n) > 1}
        expect(again, {n for n in range(items) if n % 10 == 9}, "items that ran more than once: those that failed")

    async def left(self, worker: str = "tests:worker", **options: Any) -> Checkpoint:
        """What another run finds."""
        ledger = self.make(**options)
        try:
            return await ledger.open(job_of(ledger, worker))
        finally:
            await ledger.close()

    async def commit_all(self, *commits: Commit) -> None:
        """One run that makes these commits, and ends."""
        await (await self.begun(*commits)).close()

    async def begun(self, *commits: Commit, **options: Any) -> Ledger:
        """One run that makes these commits, and goes on."""
        ledger = self.make(**options)
        await ledger.open(job_of(ledger))
        for each in commits:
            await ledger.commit(each)
        return ledger

    async def finish(self, begin_at: int = 1, **options: Any) -> None:
        """A run that finishes the job; `begin_at`: the generation of its first commit."""
        both = [commit(1, 0, [], []), commit(2, COUNT, list(range(COUNT)), [])]
        ledger = await self.begun(*(both if begin_at == 1 else []), **options)
        await ledger.finish(Bookmark(None, COUNT, 1), SUMMARY)
        await ledger.close()


def job_of(ledger: Ledger, worker: str = "tests:worker") -> Job:
    """The job of these tests."""
    return Job("iterable", worker, None, ledger.form)


def ahead(index: int) -> Ahead:
    """What is remembered of the item at that index, when it is ahead."""
    return Ahead(index, index * 11, RECORDS[index])


def commit(generation: int, mark: int, records: list[int], others: list[int]) -> Commit:
    """A commit of the records of these indices, and of others ahead of the mark."""
    return Commit(
        generation=generation,
        mark=mark,
        window=10,
        bookmark=Bookmark({"offset": mark}, mark, mark * 7),
        records=[RECORDS[index] for index in records],
        ahead=[ahead(index) for index in others],
        failed=0,
    )


def state_of(found: Checkpoint) -> tuple[int, int, int, Bookmark, int, bool]:
    """Mark, generation, window, bookmark, failures and whether it ended in order."""
    state = found.state
    if state is None:
        raise AssertionError("a commit was made, and nothing is found")
    return state.mark, state.generation, state.window, state.source, state.failed, state.ended
