"""The jobs of the service: which of them run now, and what becomes of each when its run ends.

* One job changes at a time: first in the database, then in memory, then for those who watch. A change is done to its
  end, also where whoever asked for it does not wait for that.
* The jobs that run are those in the state "running", `max_jobs` at most; the others wait by `queue_order`. A paused job
  holds no place, but stays loaded: the latest 16, since each holds files open.
* A job whose storage fails, or whose output another process holds, goes back to the queue and is tried again.
* When the service stops, every run drains and commits; its job stays "running" in the database, and goes on at the
  next start. A kill is the same without the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
import msgspec

from ..checkpoint import printable
from ..errors import AlreadyRunning, AsyncRecoveryError, Stopped, StorageFailed, UsageError, describe
from ..file_ledger import retry_of
from ..lock import Lock
from ..options import MAX_CONCURRENCY
from ..status import read_status
from ..workers import Worker, identity, is_async
from .folder import Folder
from .jobs import Input, Job, JobOptions, NotNow, check_bounds, queue_order
from .runner import Runner
from .samples import Feed, Sample, sample_of_status
from .store import Store
from .views import as_json

logger = logging.getLogger("async_recovery.service")

TICK_S = 1.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
ENDED_FEEDS = 50
PAUSED_RUNS = 16
ENDING_S = 5.0  # what a job that is to be deleted may still take to end
MOST_THREADS = 500  # of a job whose worker is a plain function: thousands of threads leave the loop no time

current_job: ContextVar[str | None] = ContextVar("current_job", default=None)
"""The job whose run a message of the log is about, where it is of one."""

T = TypeVar("T")
Step = Callable[[Job, float], Job]


class TooMany(Exception):
    """A bound of the service is reached. The message says which."""


class KeyReused(Exception):
    """An Idempotency-Key was given with another request before."""


class NoSuchWorker(UsageError):
    """No worker was registered under that name."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of a service.

    :param jobs: run at once; :param queued: wait, are paused or run; :param remembered: with those that have ended.
    :param concurrency: items at once of one job, at most.
    """

    jobs: int = 4
    queued: int = 1000
    remembered: int = 20_000
    concurrency: int = 10_000


class Manager:
    """The jobs below a folder. Use it as an async context: inside, jobs run.

    :param folder: where everything lies.
    :param workers: the functions that jobs may name.
    :param limits: bounds.
    :param clock: gives the time in seconds since the epoch.

    :ivar jobs: every job that is remembered, by its id, in the order of their numbers.
    :ivar commits: called with a job and the seconds of each commit, for metrics.
    """

    def __init__(
        self,
        folder: Folder,
        workers: Mapping[str, Worker],
        limits: Limits = Limits(),  # noqa: B008  frozen
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, worker in workers.items():
            if not callable(worker):
                raise UsageError(f"the worker {name!r} is {worker!r}: give a function of one item")
            identity(worker, None)
        if not 1 <= limits.concurrency <= MAX_CONCURRENCY or min(limits.jobs, limits.queued) < 1:
            raise UsageError(
                f"max_jobs is {limits.jobs}, max_queued {limits.queued}, max_concurrency {limits.concurrency}: "
                f"they must be 1 or more, the last {MAX_CONCURRENCY} at most"
            )
        self.folder, self.workers, self.limits = folder, dict(workers), limits
        self.boot = secrets.token_hex(4)
        self.jobs: dict[str, Job] = {}
        self.on_commit: Callable[[Job, float], object] = lambda job, seconds: None
        self._clock = clock
        self._store: Store
        self._lock: Lock
        self._changing = asyncio.Lock()
        self._unsaved: set[str] = set()
        self._runners: dict[str, Runner] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._feeds: dict[str, Feed] = {}
        self._last: dict[str, Sample] = {}  # where each stood when it was last looked at
        self._keys: dict[str, str] = {}
        self._waits: dict[str, float] = {}  # seconds that a job waits before it is tried again, for its storage
        self._not_before: dict[str, float] = {}
        self._due, self._stopped = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_open = False

    # Its life

    async def __aenter__(self) -> Manager:
        await _in_thread(self._take_folder)
        try:
            jobs = await self._store.open()
            gone = await _in_thread(self.folder.left_unsettled, {job.id for job in jobs})
            for job in jobs:
                if job.id in gone:
                    await self._store.remove(job)
                else:
                    self._know(job.found_running())
            for job_id in gone:
                await _in_thread(self.folder.delete, job_id)
            await _in_thread(self._look_at_all)
        except OSError as error:
            await self._give_back_folder()
            raise StorageFailed(f"the service's folder {self.folder.path} failed: {describe(error)}") from error
        except BaseException:
            await self._give_back_folder()
            raise
        self.is_open = True
        self._tasks |= {asyncio.create_task(self._schedule()), asyncio.create_task(self._tick())}
        self._due.set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drain()
        in_a_hurry: asyncio.CancelledError | None = None
        while waits := [task for task in (*self._tasks, *self._running.values()) if not task.done()]:
            try:
                with anyio.CancelScope(shield=in_a_hurry is not None):
                    await asyncio.wait(waits)
            except asyncio.CancelledError as error:  # what has finished is kept all the same
                in_a_hurry = error
                self.hurry()
        with anyio.CancelScope(shield=True):
            try:
                with contextlib.suppress(StorageFailed):
                    await self._save_late()
            finally:
                await self._give_back_folder()
        if in_a_hurry is not None:
            raise in_a_hurry

    def drain(self) -> None:
        """No job begins any more; those that run drain and commit. Those who watch are let go."""
        self.is_open = False
        self._due.set()
        self._stopped.set()
        for runner in self._runners.values():
            runner.run.stop()
        for feed in self._feeds.values():
            feed.close()

    def hurry(self) -> None:
        """As `drain`, but what is in flight is cancelled."""
        self.drain()
        for runner in self._runners.values():
            runner.run.cancel()

    def _take_folder(self) -> None:
        self.folder.prepare()
        self._lock, self._store = Lock(self.folder.lock), Store(self.folder.database)
        try:
            self._lock.acquire()
        except AlreadyRunning as error:
            held = str(error).partition(": another run")[0]
            raise AlreadyRunning(
                f"{held}: another service has this folder. End it first, or give --data another"
            ) from None
        except OSError as error:
            raise UsageError(
                f"{self.folder.path} can not be written to: {error.strerror}. Mend that, or give --data another"
            ) from error

    async def _give_back_folder(self) -> None:
        try:
            await self._store.close()
        finally:
            await _in_thread(self._lock.release)

    # What people ask for

    async def submit(
        self,
        worker: str,
        options: JobOptions,
        make_input: Callable[[str], Input],
        *,
        key: str | None = None,
        asked: bytes = b"",
    ) -> tuple[Job, bool]:
        """A new job; or the one that was made with the same key.

        :param make_input: makes the input of the job of that id; called in a thread.
        :param key: makes a repeated call the same job. :param asked: what was asked with it.
        :returns: the job, and whether it is new.
        :raises KeyReused: if that key was given with another request.
        :raises TooMany: if there are too many jobs.
        :raises UsageError: if the options or the input can not be used; nothing was made.
        :raises StorageFailed: if it could not be remembered; nothing was made.
        """
        self._check(worker, options)
        return await self._undivided(self._submit(worker, options, make_input, key, asked))

    async def _submit(
        self, worker: str, options: JobOptions, make_input: Callable[[str], Input], key: str | None, asked: bytes
    ) -> tuple[Job, bool]:
        digest = hashlib.sha256(asked).hexdigest()
        async with self._changing:
            if key is not None and (known := self.jobs.get(self._keys.get(key, ""))) is not None:
                if known.asked != digest:
                    raise KeyReused(f"this Idempotency-Key was given with another request, which made {known.id}")
                return known, False
            self._refuse_too_many()
            job_id = await _in_thread(self.folder.new_job)
            try:
                source = await _in_thread(make_input, job_id)
                number, now = await self._store.next_number(), self._clock()
                job = Job(number, job_id, worker, source, options, now, key=key, asked=digest if key else None)
                job = job.made(now)
                await self._store.add(job)
                try:
                    await _in_thread(self.folder.settle, job_id)
                except OSError:
                    await self._store.remove(job)
                    raise
            except BaseException:
                await _in_thread(self.folder.drop, job_id)
                raise
            self._know(job)
        self._due.set()
        return job, True

    async def pause(self, job_id: str) -> Job:
        """Nothing of it begins until `unpause`. This and the next raise NotNow, KeyError and StorageFailed."""
        return await self._change(job_id, Job.paused)

    async def unpause(self, job_id: str) -> Job:
        """It goes on when there is a place for it."""
        self._not_before.pop(job_id, None)
        return await self._change(job_id, Job.unpaused)

    async def cancel(self, job_id: str) -> Job:
        """It ends for good. What finished is kept."""
        return await self._change(job_id, Job.cancelled)

    async def retry_failed(self, job_id: str) -> Job:
        """The failed items of a complete job run again; a failed job goes on."""
        return await self._undivided(self._retry_failed(job_id))

    async def _retry_failed(self, job_id: str) -> Job:
        async with self._changing:
            output = await _in_thread(_file_at, self.folder.output(self.jobs[job_id]))
            return await self._changed(job_id, lambda job, now: job.retried(now, output))

    async def change(self, job_id: str, **changes: Any) -> Job:
        """Another concurrency or rate, at once.

        :raises UsageError: if a value can not be used.
        """
        text = ", ".join(f"{name} {value}" for name, value in changes.items())

        def changed(job: Job, now: float) -> Job:
            options = msgspec.structs.replace(job.options, **changes)
            self._check(job.worker, options)
            return job.changed(now, text, options)

        return await self._change(job_id, changed)

    async def delete(self, job_id: str) -> None:
        """Forget an ended job, with its output."""
        if self.jobs[job_id].has_ended and (ending := self._running.get(job_id)) is not None:
            await asyncio.wait({ending}, timeout=ENDING_S)
        await self._undivided(self._delete(job_id))

    async def _delete(self, job_id: str) -> None:
        async with self._changing:
            job = self.jobs[job_id]
            job.refuse_to_go()
            if job_id in self._running:
                raise NotNow("the job is still ending: try again in a moment")
            await _in_thread(self.folder.give_up, job_id)
            try:
                await self._store.remove(job)
                is_forgotten = True
            except StorageFailed as error:
                logger.warning("%s (%s is deleted all the same, at the next start)", error, job_id)
                is_forgotten = False
            del self.jobs[job_id]
            self._unsaved.discard(job_id)
            self._waits.pop(job_id, None)
            self._last.pop(job_id, None)
            if job.key is not None:
                self._keys.pop(job.key, None)
            if (feed := self._feeds.pop(job_id, None)) is not None:
                feed.close()
        if is_forgotten:
            await _in_thread(self.folder.delete, job_id)

    # What people look at

    def about(self) -> dict[str, Any]:
        """What this service has, and allows."""
        limits = {"max_jobs": self.limits.jobs, "max_concurrency": self.limits.concurrency}
        return {"workers": sorted(self.workers), "read_only": False, "has_output": True, **limits}

    def feed(self, job_id: str) -> Feed:
        """The messages about a job."""
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = Feed(self.boot)
            feed.tell_job(as_json(self.jobs[job_id]))
            if job_id not in self._runners and (sample := self._last.get(job_id)) is not None:
                feed.tell_sample(msgspec.json.encode(sample))
        return feed

    def sample(self, job_id: str) -> Sample | None:
        """Where a job stands; one that is not loaded, as it was last seen."""
        job, runner = self.jobs[job_id], self._runners.get(job_id)
        return self._last.get(job_id) if runner is None else runner.sample(job.options.concurrency, job.options.rate)

    def output_of(self, job_id: str) -> tuple[str, int | None]:
        """Path of the complete output, and how much of the partial one is committed, where a run knows that."""
        runner = self._runners.get(job_id)
        return self.folder.output(self.jobs[job_id]), None if runner is None else runner.committed_bytes

    # How a job changes

    async def _undivided(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _change(self, job_id: str, step: Step) -> Job:
        async def change() -> Job:
            async with self._changing:
                return await self._changed(job_id, step)

        return await self._undivided(change())

    async def _changed(self, job_id: str, step: Step) -> Job:
        job = self.jobs[job_id]
        new = step(job, self._clock())
        if new is not job:
            await self._store.save(new)
            self._know(new)
            self._steer(job_id)
            self._due.set()
        return new

    async def _happened(self, job_id: str, step: Step) -> None:
        """As `_change`, for what has happened already: where it can not be remembered now, that is tried again."""
        async with self._changing:
            job = self.jobs.get(job_id)
            new = None if job is None else step(job, self._clock())
            if new is None or new is job:
                return
            self._know(new)
            self._steer(job_id)
            try:
                await self._store.save(new)
                self._unsaved.discard(job_id)
            except StorageFailed as error:
                logger.warning("%s (the state of %s; it is tried again)", error, job_id)
                self._unsaved.add(job_id)

    def _steer(self, job_id: str) -> None:
        """Let the run of a job do what the job says, if it is loaded."""
        job, runner = self.jobs[job_id], self._runners.get(job_id)
        if runner is None:
            return
        runner.follow(job.options)
        if job.has_ended:
            runner.run.cancel()
        elif job.state == "running":
            runner.run.unpause()
        else:
            runner.run.pause()

    async def _save_late(self) -> None:
        async with self._changing:
            for job_id in list(self._unsaved):
                await self._store.save(self.jobs[job_id])
                self._unsaved.discard(job_id)

    def _know(self, job: Job) -> None:
        self.jobs[job.id] = job
        if job.key is not None:
            self._keys[job.key] = job.id
        if (feed := self._feeds.get(job.id)) is not None:
            feed.tell_job(as_json(job))

    def _check(self, worker: str, options: JobOptions) -> None:
        if worker not in self.workers:
            raise NoSuchWorker(f"there is no worker of that name: this service has {', '.join(sorted(self.workers))}")
        if options.concurrency > self.limits.concurrency:
            raise UsageError(f"concurrency is {options.concurrency}: this service allows {self.limits.concurrency}")
        if options.concurrency > MOST_THREADS and not is_async(self.workers[worker]):
            raise UsageError(
                f"concurrency is {options.concurrency}: {worker} is a plain function, which runs in threads, "
                f"{MOST_THREADS} at most"
            )
        check_bounds(options)
        options.of_a_run()

    def _refuse_too_many(self) -> None:
        if len(self.jobs) >= self.limits.remembered:
            raise TooMany(f"{len(self.jobs)} jobs are remembered, which is the bound: delete some that have ended")
        waiting = sum(not job.has_ended for job in self.jobs.values())
        if waiting >= self.limits.queued:
            raise TooMany(f"{waiting} jobs wait or run, which is the bound: try again when some have ended")

    # How jobs run

    async def _schedule(self) -> None:
        """Gives places to the jobs that wait, whenever something has changed."""
        while self.is_open:
            now = time.monotonic()
            for job in self._next_jobs():
                if self.is_open:
                    await self._begin(job.id)
            soonest = min(self._not_before.values(), default=now + LONGEST_WAIT_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), max(0.01, soonest - now))
            self._due.clear()
            self._not_before = {job: at for job, at in self._not_before.items() if at > time.monotonic()}

    def _next_jobs(self) -> list[Job]:
        running = sum(job.state == "running" for job in self.jobs.values())
        queued = [job for job in self.jobs.values() if job.state == "queued" and job.id not in self._not_before]
        ready = sorted((job for job in queued if not self._is_between(job.id)), key=queue_order)
        return ready[: max(0, self.limits.jobs - running)]

    def _is_between(self, job_id: str) -> bool:
        """Whether its run is just being loaded, or just ending: `_due` is set when that is over."""
        return job_id in self._running and job_id not in self._runners

    async def _begin(self, job_id: str) -> None:
        def step(job: Job, now: float) -> Job:  # what holds now: the job has been waited for
            if self._is_between(job_id):
                return job
            return job.goes_on(now) if job_id in self._running else job.begun(now)

        await self._happened(job_id, step)
        job = self.jobs.get(job_id)
        if self.is_open and job is not None and job.state == "running" and job_id not in self._running:
            task = asyncio.create_task(self._run(job_id))
            self._running[job_id] = task
            task.add_done_callback(lambda _: self._has_ended(job_id))

    def _has_ended(self, job_id: str) -> None:
        del self._running[job_id]
        self._due.set()

    async def _run(self, job_id: str) -> None:
        """One run of a job, and what becomes of the job by it."""
        current_job.set(job_id)
        try:
            summary = await _in_thread(self._retried_already, self.jobs[job_id])
            if summary is None:
                runner = self._runners[job_id] = await _in_thread(self._load, self.jobs[job_id])
                self._steer(job_id)  # what it says may have changed since
                self._due.set()
                if not self.is_open:
                    runner.run.stop()
                summary = msgspec.to_builtins(await runner.main())
                del summary["output"]  # where it lies is nobody's business who has no account here
            step: Step = partial(Job.completed, summary=summary)
        except Stopped:  # the service stops, and the job goes on at its next start; or it was cancelled, or is paused
            step = lambda job, now: job.found_running("it was loaded anew") if self.is_open else job  # noqa: E731  unpaused since, it waits
        except (StorageFailed, AlreadyRunning) as error:
            cause = self.folder.told(error).partition(". ")[0]  # what it advises is done by itself
            step = partial(Job.waits, reason=f"{cause}. It is tried again by itself")
            self._waits[job_id] = wait_s = min(LONGEST_WAIT_S, 2 * self._waits.get(job_id, FIRST_WAIT_S / 2))
            self._not_before[job_id] = time.monotonic() + wait_s
        except AsyncRecoveryError as error:
            step = partial(Job.has_failed, reason=self.folder.told(error))
        except Exception as error:
            logger.exception("the run of %s ended with a defect", job_id)
            step = partial(Job.has_failed, reason=printable(describe(error)))
        else:
            self._waits.pop(job_id, None)
        self._show(job_id)
        self._runners.pop(job_id, None)
        await self._happened(job_id, step)
        self._forget_feeds()

    def _forget_feeds(self) -> None:
        """Of the jobs that have ended, the latest are enough, and those that somebody watches."""
        idle = [job_id for job_id, feed in self._feeds.items() if not feed.listeners and self.jobs[job_id].has_ended]
        for job_id in idle[:-ENDED_FEEDS]:
            del self._feeds[job_id]

    def _load(self, job: Job) -> Runner:
        is_retry = job.retries_of is not None
        return Runner(
            self.workers[job.worker],
            None if is_retry else self.folder.input(job),
            job.input.format,
            self.folder.output(job),
            job.options,
            lambda seconds: self.on_commit(job, seconds),
        )

    def _retried_already(self, job: Job) -> dict[str, Any] | None:
        """What a retry did that had come to its end just before the service was killed: nothing is run once more."""
        output = self.folder.output(job)
        there = _file_at(output)
        if job.retries_of in (None, there) or there is None or os.path.exists(f"{retry_of(output)}.checkpoint"):
            return None
        return {"failed": read_status(output).failed, "executed": 0}

    async def _tick(self) -> None:
        """Tells where the jobs stand, and remembers what could not be remembered before."""
        while self.is_open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), TICK_S)
            for job_id in list(self._runners):
                self._show(job_id)
            self._unload_paused()
            if self._unsaved:
                with contextlib.suppress(StorageFailed):
                    await self._save_late()

    def _unload_paused(self) -> None:
        """Of the paused runs the latest are enough; the others drain, commit and end."""
        for job in [job for job in self._runners if self.jobs[job].state == "paused"][:-PAUSED_RUNS]:
            self._runners[job].run.stop()

    def _show(self, job_id: str) -> None:
        if job_id in self._runners and job_id in self.jobs and (sample := self.sample(job_id)) is not None:
            self._last[job_id] = sample
            self.feed(job_id).tell_sample(msgspec.json.encode(sample))

    def _look_at_all(self) -> None:
        """What the checkpoints say of the jobs that are not about to run: a start must not make them look untouched."""
        for job in self.jobs.values():
            if job.started is not None and job.state in ("paused", "failed", "cancelled"):
                with contextlib.suppress(UsageError):  # nothing of it was committed
                    self._last[job.id] = sample_of_status(read_status(self.folder.output(job)), job, self._clock())


def _file_at(path: str) -> str | None:
    """Which file lies there: another one has another text."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return f"{there.st_dev}:{there.st_ino}"


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)
