"""A ledger in memory: what a run leaves in its `Store` is what a resume finds.

It checks every commit against the contract. When the store's process has died, nothing reaches it any more.
"""

from __future__ import annotations

import asyncio

import msgspec

from async_recovery import AlreadyRunning, JobMismatch
from async_recovery.checkpoint import (
    FORMAT,
    Ahead,
    Bookmark,
    Checkpoint,
    Commit,
    Complete,
    Job,
    Spent,
    State,
    unfinished,
)
from async_recovery.contracts import RunSummary
from async_recovery.progress import Progress


class Store:
    """What is durable.

    :ivar records: of the items below the mark.
    :ivar ahead: of those finished ahead of it.
    :ivar published: the finished output, or None.
    :ivar commits: every commit, in order.
    :ivar dead: the process has died: nothing is written any more.
    """

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.ahead: dict[int, Ahead] = {}
        self.spent: dict[int, Spent] = {}
        self.state: State | None = None
        self.complete: Complete | None = None
        self.published: list[bytes] | None = None
        self.commits: list[Commit] = []
        self.locked = False
        self.dead = False

    @property
    def committed(self) -> set[int]:
        """The indices whose outcome is durable."""
        return set(range(len(self.records))) | set(self.ahead)

    def reborn(self) -> None:
        """The next process starts."""
        self.dead = self.locked = False


class MemoryLedger:
    """The ledger of one run over `store`."""

    form = "jsonl"
    output: str | None = "memory"

    def __init__(
        self, store: Store, *, keep_checkpoint: bool = False, delay: float = 0.0, interruptible: bool = False
    ) -> None:
        self.keeps_checkpoint = keep_checkpoint
        self._store = store
        self._delay = delay
        self._interruptible = interruptible
        self._job: Job
        self._mine = False

    async def _wait(self, call: str) -> None:
        """What the storage takes. A call that has begun comes to its end, unless this ledger is a careless one.

        :param call: which one it is.
        """
        done = asyncio.ensure_future(asyncio.sleep(self._delay))
        while not done.done():
            try:
                await asyncio.wait({done})
            except asyncio.CancelledError:
                if self._interruptible:
                    raise

    async def open(self, job: Job) -> Checkpoint:
        store = self._store
        await self._wait("open")
        if store.locked:
            raise AlreadyRunning("the store is held")
        found = store.complete or store.state
        if found is not None and found.job != job:
            raise JobMismatch(f"{found.job}, not {job}")
        store.locked = self._mine = True
        self._job = job
        if store.complete is not None:
            if not self.keeps_checkpoint:
                store.complete = None
                return Checkpoint()
            return Checkpoint(complete=store.complete, kept=True)
        return Checkpoint(store.state, dict(store.ahead), spent=dict(store.spent))

    async def audit(self) -> None:
        await self._wait("audit")

    async def commit(self, commit: Commit) -> None:
        store, last = self._store, self._store.state
        await self._wait("commit")
        if store.dead:
            return
        if last is None:
            assert (commit.generation, commit.mark, commit.records, commit.ahead) == (1, 0, [], [])
        else:
            assert commit.generation == last.generation + 1
            assert commit.mark == last.mark + len(commit.records)
        store.records += commit.records
        store.ahead.update((item.index, item) for item in commit.ahead)
        assert all(item.index >= commit.mark for item in commit.ahead)
        store.spent.update((item.index, item) for item in commit.spent)
        assert all(index >= commit.mark and index not in store.ahead for index in (item.index for item in commit.spent))
        store.spent = unfinished(store.spent, commit.mark, store.ahead)
        store.ahead = {index: item for index, item in store.ahead.items() if index >= commit.mark}
        store.state = State(
            format=FORMAT,
            job=self._job,
            input=None,
            generation=commit.generation,
            mark=commit.mark,
            window=commit.window,
            source=msgspec.convert(msgspec.to_builtins(commit.bookmark), Bookmark),
            output=None,
            failed=commit.failed,
            ended=commit.ended,
        )
        store.commits.append(commit)

    async def show(self, progress: Progress) -> None:
        await self._wait("show")

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        store = self._store
        await self._wait("finish")
        if store.dead:
            return
        assert not store.ahead
        assert len(store.records) == summary.total_items
        store.published, store.records, store.state = store.records, [], None
        if self.keeps_checkpoint:
            store.complete = Complete(FORMAT, self._job, None, bookmark, None, None, msgspec.to_builtins(summary))

    async def close(self) -> None:
        if self._mine and not self._store.dead:
            self._store.locked = self._mine = False
