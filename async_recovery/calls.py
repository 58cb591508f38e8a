"""What a program calls: `run_resumable`, and `resumable`, which also hands the run to other tasks while it goes on."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack

from .checkpoint import JSON
from .contracts import Ledger, RunSummary, Source
from .engine import Run, to_its_end
from .errors import AsyncRecoveryError, Stopped, UsageError, describe
from .executors import Executor
from .ledgers import ledger_of
from .options import Limits, OnError, Options
from .policies import RateLimit, Retry
from .progress import Progress
from .sources import as_source
from .workers import Worker

logger = logging.getLogger("async_recovery")

Path = str | os.PathLike[str]
Items = Path | Source | Iterable[Any] | AsyncIterable[Any]


async def run_resumable(
    worker: Worker,
    items: Items,
    *,
    output: Path | Ledger | None = None,
    checkpoint: Path | None = None,
    concurrency: int = 16,
    retry: Retry | int | None = None,
    timeout: float | None = None,
    on_error: OnError = "stop",
    rate_limit: RateLimit | float | None = None,
    limits: Limits = Limits(),  # noqa: B008  frozen
    checkpoint_interval: float = 1.0,
    batch_size: int | None = None,
    version: str | None = None,
    key: Callable[[Any], JSON] | None = None,
    fresh: bool = False,
    keep_checkpoint: bool = False,
    on_damage: Literal["restart", "refuse"] = "restart",
    drain_timeout: float = 10.0,
    on_progress: Callable[[Progress], object] | None = None,
    executor: Executor | None = None,
) -> RunSummary:
    """Run `worker` once for each item, many at once, and carry on after any crash when called again.

    :param worker: ``async def worker(item) -> result``; a plain ``def`` runs in a thread.
    :param items: a path (lines; JSON Lines and CSV by suffix), a `Source`, an (async) iterable from its beginning.
    :param output: path (JSON Lines; ``.json``: an array), ``"sqlite:///F"``, ``"postgresql://H/D"``, a `Ledger`, None.
    :param checkpoint: path of the journal; None: ``<output>.checkpoint``. Required without an output.
    :param concurrency: how many items at once.
    :param retry: a `Retry`, or how often an item is tried at most. None: once.
    :param timeout: seconds that an attempt may take. A plain function is let end, but its result does not count.
    :param on_error: ``"stop"``: a failure ends the run, resumable; ``"record"``, a `Record`: it takes the item's place.
    :param rate_limit: a `RateLimit`, or how many attempts may begin a second.
    :param limits: bounds on items and bytes held.
    :param checkpoint_interval: seconds between commits; with `batch_size`, also when so many items have finished.
    :param version: your own version of the job: another one does not resume it.
    :param key: makes a JSON value of an item, to tell it by; for items that can not be written as JSON.
    :param fresh: start anew, whatever is there.
    :param keep_checkpoint: remember that the job is complete: the same call then returns at once.
    :param on_damage: a checkpoint that can not be read: ``"restart"`` moves it aside and starts anew; ``"refuse"``.
    :param drain_timeout: seconds that items in flight get to finish when the run stops.
    :param on_progress: called on the event loop after each commit and every 2 seconds.
    :param executor: runs the worker elsewhere, such as a `DaskExecutor`; None: in this process.
    :returns: what was done.
    :raises UsageError: if an argument, the input or a folder can not be used; nothing was begun.
    :raises ItemFailed, TooManyFailures, InvalidItem: if workers failed, or a line is unreadable; the rest is committed.
    :raises Mismatch, AlreadyRunning: if what is there is not what was left there, or another run holds it.
    :raises StorageFailed, NoWorkers: if writing failed, or a cluster has nobody to run the worker; resumable.
    """
    options = Options(
        concurrency=concurrency,
        retry=retry,
        timeout=timeout,
        on_error=on_error,
        rate_limit=rate_limit,
        limits=limits,
        checkpoint_interval=checkpoint_interval,
        batch_size=batch_size,
        version=version,
        drain_timeout=drain_timeout,
        on_progress=on_progress,
        executor=executor,
    )
    options.check()
    source = as_source(items, key)
    ledger = ledger_of(
        output, checkpoint, input=source.path, fresh=fresh, keep_checkpoint=keep_checkpoint, on_damage=on_damage
    )
    return await to_its_end(Run(worker, source, ledger, options))


FILES = ("output", "checkpoint", "fresh", "keep_checkpoint", "on_damage")


class Arguments(TypedDict, total=False):
    """The named arguments of `run_resumable`."""

    output: Path | Ledger | None
    checkpoint: Path | None
    concurrency: int
    retry: Retry | int | None
    timeout: float | None
    on_error: OnError
    rate_limit: RateLimit | float | None
    limits: Limits
    checkpoint_interval: float
    batch_size: int | None
    version: str | None
    key: Callable[[Any], JSON] | None
    fresh: bool
    keep_checkpoint: bool
    on_damage: Literal["restart", "refuse"]
    drain_timeout: float
    on_progress: Callable[[Progress], object] | None
    executor: Executor | None


class resumable:
    """A run that other tasks can watch and steer while it goes on::

        async with resumable(fetch, "urls.txt", output="pages.jsonl") as run:
            run.set_concurrency(50)
        print(run.summary)

    The block ends when the run has ended, and raises what it raised; a run that fails cancels the block at once. An
    exception in the block stops the run as `stop` does, and is raised when what was in flight has been committed.

    :param worker: and `items` and all named arguments: as for `run_resumable`, which raises the same.
    :ivar summary: what was done, once the block has ended.
    """

    summary: RunSummary

    def __init__(self, worker: Worker, items: Items, **arguments: Unpack[Arguments]) -> None:
        rest: dict[str, Any] = {**arguments}
        files = {name: rest.pop(name) for name in FILES if name in rest}
        key = rest.pop("key", None)
        options = Options(**rest)
        options.check()
        source = as_source(items, key)
        output, checkpoint = files.pop("output", None), files.pop("checkpoint", None)

        def new_run(*, keep_records: bool) -> Run:
            ledger = ledger_of(output, checkpoint, input=source.path, keep_records=keep_records, **files)
            return Run(worker, source, ledger, options)

        self._new_run, self._has_output = new_run, output is not None
        self._has_begun = self._wants_more = False
        self._run = new_run(keep_records=False)

    async def __aenter__(self) -> resumable:
        self._main = asyncio.ensure_future(self._begin())
        self._block, self._told = asyncio.current_task(), False
        self._main.add_done_callback(self._tell_the_block)
        return self

    def _tell_the_block(self, main: asyncio.Task[RunSummary]) -> None:
        """A run that has failed ends the block as a task group would."""
        if self._block is not None and (main.cancelled() or main.exception() is not None):
            self._told = self._block.cancel()

    async def _begin(self) -> RunSummary:
        await asyncio.sleep(0)  # a task that the block has started at once may still ask for batches
        self._has_begun = True
        return await self._run.main()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if self._told and block is not None and block.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
            self._main.result()
        if self._wants_more:
            self._run.take_no_more()
        if error is None:
            self.summary = await to_its_end(self._run, self._main)
            return
        self._run.take_no_more()
        try:
            await to_its_end(self._run, self._main)
        except Stopped:
            pass
        except AsyncRecoveryError as failure:
            if failure is not error:
                logger.error("while the block raised %s: %s", describe(error), failure)

    def batches(self) -> AsyncIterator[list[bytes]]:
        """The records, in the order of the items, for a program that puts them somewhere itself::

            async with resumable(fetch, "urls.txt", checkpoint="fetch.checkpoint") as run:
                async for batch in run.batches():
                    await insert([json.loads(record) for record in batch])

        Asking for the next batch acknowledges the last one; only then is it committed. After a crash the last batch can
        come again: what is done with one is to be done in one step, or to bear being done twice. While nobody asks, the
        run goes on as far as its window reaches. To be called before anything else is awaited in the block; should the
        block end before the last batch was taken, the run stops.

        :returns: lists of records, each a JSON object in bytes without a line end; it raises what the run raises.
        :raises UsageError: if the run has an output, or has begun already.
        """
        if self._has_output:
            raise UsageError("the records go to the output: leave output= away to take them in batches")
        if self._has_begun:
            raise UsageError("the run has begun without anybody to take its records: ask for batches() at once")
        self._run = self._new_run(keep_records=True)
        return self._batches()

    async def _batches(self) -> AsyncIterator[list[bytes]]:
        self._wants_more = True
        while (batch := await self._run.next_batch(self._main)) is not None:
            yield list(batch)
        self._wants_more = False

    @property
    def progress(self) -> Progress:
        """Where the run stands now."""
        return self._run.progress()

    def pause(self) -> None:
        """Begin no attempt until `unpause`; what is in flight goes on."""
        self._run.pause()

    def unpause(self) -> None:
        """Go on after `pause`."""
        self._run.unpause()

    def set_concurrency(self, concurrency: int) -> None:
        """So many items at once from now on.

        :param concurrency: 1 to 100,000.
        :raises UsageError: if it is not.
        """
        self._run.set_concurrency(concurrency)

    def set_rate(self, rate_limit: RateLimit | float | None) -> None:
        """So many attempts may begin in a second from now on.

        :param rate_limit: as for `run_resumable`; None: as many as there can be.
        :raises UsageError: if it is none.
        """
        self._run.set_rate(rate_limit)

    def stop(self) -> None:
        """Hand out nothing more: what is in flight gets `drain_timeout` seconds, everything that finished is committed,
        and the block raises `Stopped`.
        """
        self._run.stop()
