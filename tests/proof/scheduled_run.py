"""One process: the real run, its worker, source and ledger on a `ScheduledLoop`, and a `Witness` of it all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

from async_recovery import sources
from async_recovery.checkpoint import Bookmark, Checkpoint, Commit, Job
from async_recovery.contracts import Ledger, RunSummary, Source
from async_recovery.engine import Run, to_its_end
from async_recovery.errors import ItemFailed, Stopped, StorageFailed
from async_recovery.progress import Progress
from async_recovery.sources import IterableSource, TextSource

from .explorer import Violation
from .scheduled_loop import Choices, ScheduledLoop
from .witness import Past, Plan, Witness

STOP, CANCEL, NATIVE, AGAIN, TEAR_DOWN = "!stop", "!cancel", "!native cancel", "!native cancel again", "!tear down"
CANCELLATIONS = (STOP, CANCEL, NATIVE, TEAR_DOWN)
DRAIN_LAPSES = 1


class WatchedLedger:
    """A ledger, and the witness of all that is said to it."""

    def __init__(self, ledger: Ledger, witness: Witness) -> None:
        self.form = ledger.form
        self.output = ledger.output
        self.keeps_checkpoint = ledger.keeps_checkpoint
        self._ledger = ledger
        self._witness = witness

    async def open(self, job: Job) -> Checkpoint:
        found = await self._ledger.open(job)
        self._witness.opened(found)
        return found

    async def audit(self) -> None:
        await self._ledger.audit()
        self._witness.compared()

    async def commit(self, commit: Commit) -> None:
        self._witness.commit_begins(commit)
        try:
            await self._ledger.commit(commit)
        except (StorageFailed, asyncio.CancelledError) as error:
            self._witness.failed(error)
            raise
        self._witness.acknowledged()

    async def show(self, progress: Progress) -> None:
        await self._ledger.show(progress)

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        self._witness.finish_begins(bookmark, summary)
        try:
            await self._ledger.finish(bookmark, summary)
        except (StorageFailed, asyncio.CancelledError) as error:
            self._witness.failed(error)
            raise
        self._witness.finish_ended()

    async def close(self) -> None:
        await self._ledger.close()


class _OpenText:
    """An open file in memory; each read is a moment."""

    def __init__(self, data: bytes, loop: ScheduledLoop) -> None:
        self._data = data
        self._loop = loop
        self._offset = 0

    async def __aenter__(self) -> _OpenText:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def seek(self, offset: int) -> None:
        self._offset = offset

    async def read(self, size: int) -> bytes:
        await self._loop.moment("read")
        block = self._data[self._offset : self._offset + size]
        self._offset += len(block)
        return block


class _TextInMemory(TextSource):
    """The real source of text lines, over bytes in memory."""

    def __init__(self, data: bytes, loop: ScheduledLoop) -> None:
        super().__init__("/async-recovery-model.txt")
        self._data = data
        self._loop = loop

    def _opened(self) -> _OpenText:
        return _OpenText(self._data, self._loop)

    def _measure(self, file: object) -> int:
        return len(self._data)


async def _one_by_one(names: Iterable[str], loop: ScheduledLoop) -> AsyncIterator[str]:
    for name in names:
        await loop.moment("source")
        yield name


class ScheduledRun:
    """One process. It is over when `live` returns or raises.

    :param past: what earlier ones have done.
    :param ledger: makes the ledger on the loop.
    :param kinds: the cancellations of which one may happen.
    :param fallible: whether workers may fail; `trusting`: see `Witness`.
    :param then: makes what decides after the cancellation; None: what decided before it.
    """

    def __init__(
        self,
        plan: Plan,
        past: Past,
        loop: ScheduledLoop,
        ledger: Ledger,
        *,
        kinds: Iterable[str] = (),
        fallible: bool = False,
        trusting: bool = False,
        then: Callable[[], Choices] | None = None,
    ) -> None:
        self.loop = loop
        self.witness = Witness(plan, past, loop, trusting=trusting)
        self._fallible = fallible
        self._then = then
        self._run = self.witness.run = Run(
            self._worker(), self._source(plan), WatchedLedger(ledger, self.witness), plan.options()
        )
        self._take_commit = self._run._take_commit
        self._run._take_commit = self._taken  # type: ignore[method-assign]
        self._names = {name: index for index, name in enumerate(self.witness.items.names)}
        self._task: asyncio.Task[RunSummary]
        loop.look = self.witness.look
        loop.actions = {kind: partial(self._cancel, kind) for kind in kinds}

    def live(self, published: Callable[[], bool]) -> Past:
        """The whole life.

        :param published: whether the output is there, whole.
        :returns: what has been done now.
        :raises Violation: if an invariant does not hold.
        """
        loop, witness = self.loop, self.witness
        self._task = loop.create_task(to_its_end(self._run))
        self._task.add_done_callback(lambda _: loop.stop())
        try:
            loop.run_forever()
            if not self._task.done():
                self._tear_down()
            witness.ended(_outcome(self._task), published=published())
            if loop.broken is not None:
                raise Violation(loop.broken)
        finally:
            loop.close()
        return witness.past

    def _taken(self) -> Commit:
        commit = self._take_commit()
        self.witness.taken()
        return commit

    def _tear_down(self) -> None:
        """What ``asyncio.run`` does when the main coroutine has returned: every task is cancelled, at once."""
        left = [task for task in self.loop.tasks if not task.done()]
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def _cancel(self, kind: str) -> None:
        loop, excused = self.loop, self.witness.excused
        loop.actions.clear()
        if self._then is not None:
            loop.choices = self._then()
        if kind == STOP:
            loop.call_soon(self._run.stop)
        elif kind == CANCEL:
            loop.call_soon(self._run.cancel)
        elif kind == TEAR_DOWN:
            loop.stop()
        else:
            self._task.cancel()
        if kind == NATIVE:
            loop.actions[AGAIN] = partial(self._cancel, AGAIN)
        loop.lapses = max(loop.lapses, DRAIN_LAPSES)
        excused.add(Stopped if kind in (STOP, CANCEL) else asyncio.CancelledError)

    def _source(self, plan: Plan) -> Source:
        items = self.witness.items
        if plan.source == "text":
            return _TextInMemory(items.text, self.loop)
        return IterableSource(items.names if plan.source == "list" else _one_by_one(items.names, self.loop))

    def _worker(self) -> Callable[[str], Coroutine[Any, Any, dict[str, str]]]:
        """An item ends when the explorer says so, by a failure if it may."""
        witness, loop = self.witness, self.loop

        async def worker(name: str) -> dict[str, str]:
            index = self._names[name]
            witness.started(index)
            chosen = ""
            try:
                chosen = await loop.moment(f"item {index}", *([f"!item {index} fails"] if self._fallible else ()))
            finally:
                if not chosen.startswith("item"):
                    witness.let_go(index)
            if chosen.startswith("!"):
                witness.excused.add(ItemFailed)
                raise RuntimeError("as the explorer says")
            witness.finished(index)
            return witness.items.result(index)

        return worker


def _outcome(task: asyncio.Task[RunSummary]) -> RunSummary | BaseException:
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception() or task.result()


@contextlib.contextmanager
def small_and_silent() -> Iterator[None]:
    """Pages of text of a few lines, blocks of a few pages; no log, and no word of tasks torn down before they began."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with mock.patch.multiple(sources, PAGE_BYTES=10, BLOCK_BYTES=24, COMPARED_BYTES=8), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        logging.disable(disabled)


def choices_id(choices: Choices) -> str:
    """The choices as they stand in a state's id."""
    return ".".join(map(str, choices.made)) or "-"
