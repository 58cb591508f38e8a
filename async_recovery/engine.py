"""The run: a cursor, workers, an ordered collector, and the moment of commit.

::

    source ─page→ cursor ─(index, item)→ worker ─outcome→ collector ─Commit→ ledger
                  pulls, no queue        await            synchronous        one task, off the loop

* Four kinds of task: one fetches pages, `concurrency` workers pull items, one persists, one compares what was there
  before. They share plain state, and no task awaits between reading and changing it.
* A commit is one immutable value, taken in one step. Live state is never read again around its await.
* Nothing is published unless the source is exhausted and mark = frontier = durable mark.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from math import inf
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from .admission import Admission
from .checkpoint import JSON, Ahead, Bookmark, Checkpoint, Commit, Job, State, printable
from .collector import Collector
from .consumer import Consumer
from .contracts import Ledger, Page, Patient, RunSummary, Source
from .cursor import Cursor, aclose, compare
from .errors import (
    AsyncRecoveryError,
    IncompleteRun,
    InputChanged,
    ItemFailed,
    ResultRefused,
    SlowDown,
    Stopped,
    TooManyFailures,
    UsageError,
    check_number,
    describe,
    shorten,
)
from .executors import Executor, Work, WorkerPool
from .ledgers import place_of
from .options import MAX_CONCURRENCY, Options, rate_of
from .policies import RateLimit, Record
from .pool import Pool, cancelled
from .progress import NOT_BEGUN, Progress
from .records import encode_failure, encode_record, read_failure
from .watermark import Watermark
from .workers import Session, SessionWorker, Worker, as_async, identity, is_async

logger = logging.getLogger("async_recovery")

SHOW_INTERVAL_S = 2.0
STUCK_S = 60.0  # the mark stands still for so long: said once, and again after 4 times as long
START = Bookmark(None, 0, 0)


async def to_its_end(run: Run, main: asyncio.Task[RunSummary] | None = None) -> RunSummary:
    """Run it in a task of its own, so that a cancelled caller can still wait for what is finished to be committed.

    The first cancellation stops the run as `Run.stop` does, a second one as `Run.cancel`; both are raised in the end.

    :param main: that task, if it has begun already.
    """
    task = main or asyncio.ensure_future(run.main())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            with anyio.CancelScope(shield=cancelled is not None):
                await asyncio.wait({task})
        except asyncio.CancelledError as error:
            if cancelled is None:
                cancelled = error
                run.stop()
            else:
                run.cancel()
    if cancelled is None:
        return task.result()
    error_of_run = None if task.cancelled() else task.exception()
    if error_of_run is not None and not isinstance(error_of_run, Stopped):
        logger.error("while the run was cancelled: %s", describe(error_of_run))
    raise cancelled


class Run:
    """One run of one job.

    :param worker: the user's function.
    :param source: where items come from.
    :param ledger: where records and progress go.
    :param options: checked already.
    :ivar job: which job it is, for its checkpoint.
    :raises UsageError: if the worker can not be told from others.
    """

    def __init__(self, worker: Worker, source: Source, ledger: Ledger, options: Options) -> None:
        if not callable(worker):
            raise UsageError(f"the worker is {worker!r}: give a function of one item")
        version = None if options.version is None else printable(options.version)
        self.job = Job(source.kind, identity(worker, options.version), version, ledger.form)
        self._executor = options.executor
        self._place: str | None = None
        self._session: Session | None = None  # elsewhere, it begins there
        if isinstance(worker, SessionWorker) and self._executor is None:
            self._session = worker.begin()
        self._given_worker = self._session or worker
        self._source = source
        self._ledger = ledger
        self._options = options
        self._error: BaseException | None = None
        self._reasons: Counter[str] = Counter()  # why items failed that ended the run, or failed while it ended
        self._stopping = self._cancelling = self._asked_to_stop = False
        self._stopped_by = inf  # how long a stop waits for what is in flight, to the program that takes the records too
        self._idle: anyio.CancelScope | None = None
        self._is_connected = self._is_set_up = self._begun = self._in_doubt = self._fetched = self._paused = False
        self._concurrency, self._rate = options.concurrency, options.rate
        self._due = asyncio.Event()
        self._audited = asyncio.Event()
        self._attempts_failed = self._recorded_in_run = 0
        self._commits, self._commit_s = 0, 0.0
        self._began = self._held_since = 0.0
        self._held_mark = -1
        self._warn_at_s = STUCK_S
        self._generation = 0
        self._failed = 0  # recorded failures below the mark of the last commit
        self._failures: set[int] = set()  # and the indices of those above it
        self._resumed_from = 0
        self._finished_at_start = 0
        self._bookmark = START
        self._watermark: Watermark[bytes]
        self._collector: Collector
        self._cursor: Cursor
        self._consumer = Consumer()
        self._has_consumer = ledger.form == "records"
        self._leaving: list[bytes] = []  # the records that the commit under way lets go of
        self._admission: Admission
        self._pool: WorkerPool

    async def main(self) -> RunSummary:
        """The whole run, from the lock to the published output; see `run_resumable` for what it raises."""
        self._began = self._held_since = anyio.current_time()
        try:
            if self._executor is not None:
                await self._connect(self._executor)
            checkpoint = await self._ledger.open(self.job)
            if self._executor is not None:
                self._place = await asyncio.to_thread(place_of, self._ledger)
            self._restore(checkpoint)
            if checkpoint.complete is not None:
                return await self._already_complete(checkpoint, checkpoint.complete.summary)
            await self._process(checkpoint)
            return await self._finish()
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    # While the lock is held: no other run works beside what this ends.
                    if self._session is not None:
                        await self._session.aclose()
                    if self._executor is not None and self._is_connected:
                        await self._executor.close()
                finally:
                    await self._ledger.close()

    async def _connect(self, executor: Executor) -> None:
        with self._until_stopped() as connecting:
            await executor.connect(self._given_worker)
            self._is_connected = True
        if connecting.cancelled_caught:
            raise Stopped("stopped before the job was looked at. Nothing has changed")

    def stop(self) -> None:
        """Hand out nothing more; what is in flight gets `drain_timeout` seconds, then it is cancelled."""
        self._stop()
        self._asked_to_stop = True
        self._hasten()

    def _hasten(self) -> None:
        """When all has ended after somebody has asked for it, no storage that is away is waited for."""
        has_ended = not self._begun or self._pool.ended
        if self._asked_to_stop and has_ended and isinstance(self._ledger, Patient):
            self._ledger.hasten()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            if self._idle is not None:
                self._idle.cancel()
            self._stopped_by = anyio.current_time() + self._options.drain_timeout
            if self._begun:
                self._cursor.stop()
                self._pool.drain(self._options.drain_timeout)
            self._due.set()

    def take_no_more(self) -> None:
        """Stop, and do not wait for anybody to take records: nobody does."""
        self._consumer.is_gone = True
        self.stop()
        self._due.set()

    def cancel(self) -> None:
        """Hand out nothing more and cancel what is in flight; what has finished is still committed."""
        self.stop()
        self._cancelling = True
        if self._begun:
            self._pool.cancel()
        self._due.set()

    def pause(self) -> None:
        """Begin no attempt until `unpause`."""
        self._paused = True
        if self._is_set_up:
            self._admission.pause()

    def unpause(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        if self._is_set_up:
            self._admission.unpause()

    def set_concurrency(self, concurrency: int) -> None:
        """So many items at once from now on.

        :raises UsageError: if that is no number from 1 to 100,000.
        """
        check_number("concurrency", concurrency, least=1, most=MAX_CONCURRENCY)
        self._concurrency = concurrency
        if self._begun:
            self._pool.set_concurrency(concurrency)

    def set_rate(self, limit: RateLimit | float | None) -> None:
        """So many attempts may begin in a second from now on; None: as many as there can be.

        :raises UsageError: if that is no rate.
        """
        rate = rate_of(limit)
        self._rate = rate
        if self._is_set_up:
            self._admission.set_rate(rate)

    def progress(self) -> Progress:
        """Where the run stands now."""
        if not self._is_set_up:
            return NOT_BEGUN
        watermark, now = self._watermark, anyio.current_time()
        if watermark.mark != self._held_mark:
            self._held_mark, self._held_since, self._warn_at_s = watermark.mark, now, STUCK_S
        ahead = len(watermark.ahead)
        return Progress(
            elapsed_s=now - self._began,
            resumed_from=self._resumed_from,
            executed=self._collector.executed,
            finished=watermark.mark + ahead,
            failed=self._failed + len(self._failures),
            retries=self._admission.retries,
            waiting=len(self._admission.waiting),
            paused=self._pool.why_paused() or self._admission.why_paused(now),
            mark=watermark.mark,
            durable_mark=watermark.durable,
            frontier=watermark.frontier,
            ahead=ahead,
            in_flight=watermark.in_flight,
            commits=self._commits,
            commit_s=self._commit_s,
            held_by=watermark.mark if watermark.in_flight else None,
            held_s=now - self._held_since,
            held_attempt=self._admission.spent.get(watermark.mark, 0) + 1,
            share=self._share(watermark.mark + ahead),
            share_at_start=self._share(self._finished_at_start),
            workers=self._pool.seen(),
        )

    def _share(self, finished: int) -> float | None:
        """How much of the input so many items are, on the average of those that have been read."""
        read = self._cursor.read_so_far(self._source.share)
        return None if read is None else min(1.0, read[0] * finished / read[1])

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Set up the rules as the checkpoint left them."""
        state, options = checkpoint.state, self._options
        mark = 0
        if state is not None:
            mark, self._bookmark, self._generation = state.mark, state.source, state.generation
            self._failed = state.failed
        if checkpoint.complete is not None:
            self._bookmark, mark = checkpoint.complete.source, checkpoint.complete.summary["total_items"]
        self._resumed_from = mark
        ahead = {index: item.record or b"" for index, item in checkpoint.ahead.items()}
        self._watermark = Watermark(options.window, mark, ahead)
        self._finished_at_start = mark + len(ahead)
        half_window = max(1, options.window // 2)
        batch = min(options.batch_size or half_window, half_window) if options.checkpoint_interval else 1
        half_bytes = max(1, options.limits.max_buffer_bytes // 2)
        self._failures = {index for index, record in ahead.items() if read_failure(record)}
        self._collector = Collector(self._watermark, batch_items=batch, batch_bytes=half_bytes)
        self._cursor = Cursor(
            self._collector,
            self._bookmark,
            checkpoint.ahead.values(),
            max_buffer_bytes=options.limits.max_buffer_bytes,
            low_water=2 * options.concurrency,  # one round of all workers, and the next
            full=self._commit_if_it_helps,
        )
        self._consumer.restore(mark, ahead)
        self._set_up_workers(checkpoint)
        self._is_set_up = True
        if self._paused:
            self._admission.pause()

    def _set_up_workers(self, checkpoint: Checkpoint) -> None:
        options, retry = self._options, self._options.retrying
        interruptible = is_async(self._given_worker)
        self._admission = Admission(
            self._cursor,
            self._concurrency,
            retry=retry,
            rate_limit=self._rate,
            spent=checkpoint.spent if retry is not None else {},
            resumed=checkpoint.state is not None,
            suspects_below=_suspects_below(checkpoint.state),
            commit=self._due.set,
            give_up=self._item_failed,
            settled_by_worker=not interruptible or self._executor is not None,
            dice=random.random,
        )
        if self._executor is not None:
            self._pool = self._executor.pool(self._work_elsewhere())
            return
        self._pool = Pool(
            as_async(self._given_worker, self._admission.settle_from_thread),
            self._admission,
            self._cursor,
            self._collector,
            encode_record if self._ledger.form != "none" else _no_record,
            timeout=options.timeout,
            has_deadline=retry is not None and retry.deadline is not None,
            interruptible=interruptible,
            failed=self._attempt_failed,
            broken=self._fail,
            commit_helps=self._commit_helps,
            due=self._due,
        )

    def _work_elsewhere(self) -> Work:
        options = self._options
        return Work(
            self._admission,
            self._cursor,
            self._collector,
            timeout=options.timeout,
            has_deadline=options.retrying is not None and options.retrying.deadline is not None,
            keeps_records=self._ledger.form != "none",
            place=self._place,
            failed=self._attempt_failed,
            give_up=self._item_failed,
            broken=self._fail,
            commit_helps=self._commit_helps,
            commit_due=self._due.set,
        )

    async def _already_complete(self, checkpoint: Checkpoint, summary: dict[str, JSON]) -> RunSummary:
        """The summary of a job that was complete; one that was kept on purpose only if the input is still the same."""
        if checkpoint.kept:
            try:
                with self._until_stopped() as comparing:
                    await self._source.check(self._bookmark.position, whole=True)
                    await self._source.check(self._bookmark.position, whole=False)
                    await compare(self._source, self._bookmark, self._cursor, self._resumed_from - 1)
                    if self._cursor.total_items > self._resumed_from:
                        raise InputChanged(
                            f"the input has grown beyond the {self._resumed_from} items that were done: "
                            "start anew with --fresh (fresh=True)"
                        )
            except InputChanged as error:
                raise InputChanged(f"the job is complete, but {error}") from error
            if comparing.cancelled_caught:
                raise Stopped("stopped while the input of the complete job was compared. Nothing has changed")
        logger.info("the job is complete already: nothing to do")
        return msgspec.convert({**summary, "executed": 0}, RunSummary)

    async def _process(self, checkpoint: Checkpoint) -> None:
        """Every item, or as many as there can be; everything that finished is committed in the end."""
        pages = self._source.pages(self._bookmark.position)
        fetching: asyncio.Task[None] | None = None
        try:
            async with anyio.create_task_group() as tasks:
                try:
                    with self._until_stopped() as starting:
                        await self._source.check(self._bookmark.position, whole=False)
                        reached = asyncio.get_running_loop().create_future()
                        fetching = asyncio.create_task(self._fetch(pages, reached))
                        await reached
                    if not starting.cancelled_caught:
                        await self._work_through(checkpoint, tasks)
                except Exception as error:
                    self._fail(error)
                    self.cancel()  # what is in flight after a failed commit could not be kept
                tasks.cancel_scope.cancel()
        finally:
            self._fetched = True
            with anyio.CancelScope(shield=True):
                if fetching is None or await cancelled([fetching]):
                    with anyio.move_on_after(self._options.drain_timeout):
                        await aclose(pages)
                else:
                    logger.error("the source of the items does not end although it was cancelled, and is left alone")
        if isinstance(self._error, TooManyFailures):
            self._error = self._too_many()  # more may have failed since, in the drain
        if self._error is not None:
            raise self._error
        if self._stopping and not self._is_whole:
            durable = self._watermark.durable
            ahead = self._watermark.mark + len(self._watermark.ahead) - durable
            raise Stopped(
                f"stopped at the mark {durable}, with {ahead} items finished ahead of it. "
                "Everything that finished is saved: run the same line again to go on"
            )
        if not self._is_whole:
            raise IncompleteRun(
                f"the run ended early: mark {self._watermark.mark}, frontier {self._watermark.frontier}, durable "
                f"{self._watermark.durable}. What is committed is safe; run the same line again, and report this"
            )

    async def _work_through(self, checkpoint: Checkpoint, tasks: TaskGroup) -> None:
        if checkpoint.state is None:
            await self._commit()  # the mark 0: from here on, a start finds this job
        else:
            logger.info("resuming at index %d, with %d items ahead of it", self._resumed_from, len(checkpoint.ahead))
        tasks.start_soon(self._audit, checkpoint)
        tasks.start_soon(self._work)
        try:
            await self._persist()
        except asyncio.CancelledError:  # the whole loop is being torn down: keep what has finished all the same
            self.cancel()
            if not self._begun:  # cancelled before its first step, the work never begins, nor ends
                self._pool.ended = True
            if not self._in_doubt:
                with anyio.CancelScope(shield=True):
                    await self._persist()
            raise
        if self._is_finished:
            with self._until_stopped():
                await self._audited.wait()

    def _until_stopped(self) -> anyio.CancelScope:
        """A scope for waiting while nothing is in flight: a stop ends it at once."""
        self._idle = anyio.CancelScope()
        if self._stopping:
            self._idle.cancel()
        return self._idle

    @property
    def _is_whole(self) -> bool:
        """Whether the output may be published: everything is finished, durable and compared."""
        return self._is_finished and self._audited.is_set() and self._error is None

    @property
    def _is_finished(self) -> bool:
        watermark = self._watermark
        return (
            self._cursor.exhausted
            and watermark.mark == watermark.frontier == watermark.durable == self._cursor.total_items
        )

    async def _fetch(self, pages: AsyncIterator[Page], reached: asyncio.Future[None]) -> None:
        """Adds pages while they are wanted; `reached` is done when they have reached the mark, or can not."""
        cursor = self._cursor
        try:
            async for page in pages:
                cursor.add(page)
                if not cursor.skipping and not reached.done():
                    reached.set_result(None)
                await cursor.wanted.wait()
            cursor.end()
            if not reached.done():
                reached.set_result(None)
        except BaseException as error:
            if self._fetched or isinstance(error, GeneratorExit):  # it is we who end it
                raise
            failure = error if isinstance(error, AsyncRecoveryError) else _source_failed(error)
            if not reached.done():
                reached.set_exception(failure)
                return
            # What was read before is still worth its work; the run ends when it is done.
            self._fail(failure, stop=False)
            cursor.exhausted = True
            cursor.wake()

    async def _audit(self, checkpoint: Checkpoint) -> None:
        """Compares all that was there before with what is remembered, beside the work."""
        try:
            if checkpoint.state is not None:
                await self._source.check(checkpoint.state.source.position, whole=True)
                await self._ledger.audit()
            self._audited.set()
        except Exception as error:
            self._fail(error)

    async def _work(self) -> None:
        """The workers, from the first item to the last."""
        self._begun = True
        if self._stopping:
            self._cursor.stop()
            self._pool.drain(self._options.drain_timeout)
        if self._cancelling:
            self._pool.cancel()
        if self._options.recording is not None:
            self._check_failures(self._options.recording)
        try:
            await self._pool.run(self._concurrency)
        finally:
            self._admission.close()
            if more := self._reasons.total() - len(self._reasons):
                logger.warning("%d more items failed, for the same reason as one that is named", more)
            self._hasten()

    def _attempt_failed(self, index: int, item: Any, error: BaseException, began: float | None) -> None:
        """The one place for the decision what a failed attempt means."""
        self._attempts_failed += 1
        if self._options.on_failed_attempt is not None:
            self._options.on_failed_attempt(index, item, error)
        slow_down = SlowDown.within(error)
        if slow_down is not None:
            self._admission.slow_down(index, item, slow_down)
        elif not self._admission.failed(index, item, error, began):
            self._item_failed(index, item, error)

    def _item_failed(self, index: int, item: Any, error: BaseException) -> None:
        """No attempt is left: with on_error="stop" the run ends, otherwise the failure is the item's outcome."""
        record = self._options.recording
        if record is None or isinstance(error, KeyboardInterrupt):
            self._pool.let_go.add(index)
            self._fail(ItemFailed(index, item, error))
            if isinstance(error, KeyboardInterrupt):  # somebody wants it to end now, whichever item it hit
                self.cancel()
            return
        try:
            failure = encode_failure(index, item, error)
        except ResultRefused as refused:
            self._pool.let_go.add(index)
            refused.__cause__ = error
            self._fail(ItemFailed(index, item, refused))
            return
        logger.warning("item %d (%s) failed: %s", index, shorten(item), describe(error))
        self._admission.forget(index)
        self._failures.add(index)
        self._recorded_in_run += 1
        if self._collector.complete(index, failure):
            self._due.set()
        self._check_failures(record)

    def _check_failures(self, record: Record) -> None:
        failed, watermark = self._failed + len(self._failures), self._watermark
        if record.is_exceeded(failed, watermark.mark + len(watermark.ahead)) and self._error is None:
            self._fail(self._too_many())

    def _too_many(self) -> TooManyFailures:
        record = self._options.recording
        assert record is not None
        return TooManyFailures(
            f"failed items: {self._failed + len(self._failures)}, more than max_failures={record.max_failures} allows. "
            "Everything that finished is saved: mend the cause, and run the same line again with a higher bound"
        )

    def _fail(self, error: BaseException, *, stop: bool = True) -> None:
        """The first error is the run's; it stops. Further ones are logged, failed items in short, once a reason."""
        if isinstance(error, ItemFailed):
            self._reasons[error.reason] += 1
        if self._error is None:
            self._error = error
        elif isinstance(error, ItemFailed):
            if self._reasons[error.reason] == 1:
                logger.warning("%s", error.in_short)
        elif error is not self._error:
            logger.error("%s", error)
        if stop:
            self._stop()

    def _commit_helps(self) -> bool:
        """Whether a commit would move the durable mark."""
        mark = self._watermark.mark if not self._has_consumer else self._consumer.taken
        return mark > self._watermark.durable

    @property
    def _has_news(self) -> bool:
        """Whether a commit would write anything new."""
        collector = self._collector
        pending = collector.pending
        if self._has_consumer:  # records that the journal has may still have to be released
            pending = collector.fresh > 0 or bool(self._watermark.released) or self._commit_helps()
        return pending or bool(self._admission.changed)

    def _commit_if_it_helps(self) -> None:
        if self._commit_helps():
            self._due.set()

    async def _persist(self) -> None:
        """Commits when it is due, until the workers have ended and all that they finished is durable."""
        interval = self._options.checkpoint_interval or SHOW_INTERVAL_S
        next_commit = anyio.current_time() + interval
        next_show = anyio.current_time() + SHOW_INTERVAL_S
        while True:
            wait_until = min(next_commit, next_show)
            if self._pool.ended:
                wait_until = min(wait_until, self._stopped_by)
            with anyio.CancelScope(deadline=wait_until):
                await self._due.wait()
            now, ended = anyio.current_time(), self._pool.ended
            if self._due.is_set() or now >= next_commit:
                self._due.clear()
                next_commit = now + interval
                if self._has_news:
                    await self._commit()
            if now >= next_show:
                next_show = now + SHOW_INTERVAL_S
                await self._show()
            if ended and not self._waits_for_consumer:
                break
        if self._suspects and not self._is_finished and not self._in_doubt:
            self._admission.end_in_order()
            await self._commit(ended=True)

    @property
    def _waits_for_consumer(self) -> bool:
        """Whether the end of the run waits for the application to take records, or for what it took to be durable."""
        if not self._has_consumer or self._commit_helps():
            return self._has_consumer
        if self._cancelling or self._consumer.is_gone or anyio.current_time() >= self._stopped_by:
            return False
        return self._consumer.taken < self._watermark.mark

    async def next_batch(self, main: asyncio.Task[RunSummary]) -> list[bytes] | None:
        """The records that follow in the order of the items; the batch before is acknowledged, and durable as such.

        :param main: the task that runs `main`.
        :returns: None when all of them were taken and the run has ended.
        """
        consumer = self._consumer
        if consumer.acknowledge():
            self._due.set()
        main.add_done_callback(consumer.wake)
        while not main.done():
            if self._is_set_up and self._watermark.durable == consumer.taken and (batch := consumer.next_batch()):
                return batch
            await consumer.changed()
        main.result()
        return None

    @property
    def _suspects(self) -> bool:
        """Whether a start after this run has to know if the process died."""
        retry = self._options.retrying
        return retry is not None and retry.quarantine_after is not None

    def _take_commit(self) -> Commit:
        """All that one durable step writes, in one immutable value; no await in here."""
        records, ahead = self._collector.take()
        mark = self._watermark.mark
        if self._has_consumer:
            ahead = self._consumer.release(records, ahead)
            self._leaving, records, mark = self._consumer.acknowledged(), [], self._consumer.taken
        self._bookmark = self._cursor.bookmark(mark)
        self._generation += 1
        passed = {index for index in self._failures if index < mark}
        self._failures -= passed
        self._failed += len(passed)
        return Commit(
            generation=self._generation,
            mark=mark,
            window=self._options.window,
            bookmark=self._bookmark,
            records=records,
            ahead=list(map(Ahead, ahead, self._cursor.item_crcs(ahead), ahead.values())),
            spent=self._admission.take_spent(),
            failed=self._failed,
        )

    async def _commit(self, *, ended: bool = False) -> None:
        commit = self._take_commit()
        if ended:
            commit = msgspec.structs.replace(commit, ended=True)
        self._in_doubt, began = True, anyio.current_time()  # and for good, if it raises: nothing is committed after it
        with anyio.CancelScope(shield=True):
            await self._ledger.commit(commit)
        self._in_doubt = False
        self._admission.committed()
        self._collector.acknowledge(commit.mark, self._leaving if self._has_consumer else commit.records)
        self._commits += 1
        self._commit_s = anyio.current_time() - began
        self._cursor.wake()
        if self._has_consumer:
            self._consumer.wake()
        self._tell(self.progress())

    async def _show(self) -> None:
        progress = self.progress()
        self._warn_of_stuck_head(progress)
        with anyio.CancelScope(shield=True):
            await self._ledger.show(progress)
        self._tell(progress)

    def _warn_of_stuck_head(self, progress: Progress) -> None:
        if progress.held_by is None or progress.paused or progress.held_s < self._warn_at_s:
            return
        while self._warn_at_s <= progress.held_s:
            self._warn_at_s *= 4
        room = progress.durable_mark + self._options.window - progress.frontier
        logger.warning(
            "item %d holds the mark for %.0f s, at attempt %d: %d finished items wait behind it, %d more may begin",
            progress.held_by,
            progress.held_s,
            progress.held_attempt,
            progress.ahead,
            room,
        )

    def _tell(self, progress: Progress) -> None:
        if self._options.on_progress is not None:
            try:
                self._options.on_progress(progress)
            except (Exception, asyncio.CancelledError):  # nothing can have cancelled a plain call
                logger.exception("on_progress failed; the run goes on")

    async def _finish(self) -> RunSummary:
        """Publish the output of a whole run."""
        total = self._cursor.total_items
        summary = RunSummary(
            total_items=total,
            processed=total,
            checkpoint_cleared=not self._ledger.keeps_checkpoint,
            resumed_from=self._resumed_from,
            executed=self._collector.executed - self._recorded_in_run + self._attempts_failed,
            failed=self._failed,
            elapsed_s=round(anyio.current_time() - self._began, 3),
            output=None if self._ledger.output is None else printable(self._ledger.output),
        )
        with anyio.CancelScope(shield=True):
            await self._ledger.finish(self._cursor.bookmark(total), summary)
        return summary


def _suspects_below(state: State | None) -> int:
    """The index below which an earlier process may have begun items, if it did not end in order."""
    return 0 if state is None or state.ended else state.mark + state.window


def _no_record(index: int, result: Any) -> bytes:
    return b""


def _source_failed(error: BaseException) -> AsyncRecoveryError:
    failure = IncompleteRun(f"the source of the items failed: {describe(error)}. What finished is saved")
    failure.__cause__ = error
    return failure
