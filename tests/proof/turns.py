"""A worker whose items finish in turns, so that a job does the same file operations in the same order each time.

All items are in flight at once. Those of the first turn finish together, at once; those of the next when all of the
turn before are committed; and so on. A resume goes on with the turns, less what is committed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from typing import Any

from async_recovery.checkpoint import Checkpoint, Commit, Job
from async_recovery.file_ledger import FileLedger
from tests.support.jobs import LOG

WORKER = f"{__name__}:worker"
FAILS = 999


class _Turns:
    """What is committed, and who waits for more."""

    def __init__(self, turns: list[list[int]]) -> None:
        self.committed: set[int] = set()
        self.more = asyncio.Event()
        self._before = {i: set(itertools.chain(*turns[:number])) for number, turn in enumerate(turns) for i in turn}

    def may_finish(self, item: int) -> bool:
        return self._before.get(item, set()) <= self.committed

    def commit(self, mark: int, ahead: list[int]) -> None:
        self.committed.update(range(mark), ahead)
        more, self.more = self.more, asyncio.Event()
        more.set()


_turns = _Turns([])  # without turns, all items finish at once


def take(report: int, turns: str) -> None:
    """From now on in this process, items finish in these turns: lists of their indices, as JSON."""
    global _turns
    _turns = _Turns(json.loads(turns))
    open_, commit_ = FileLedger.open, FileLedger.commit

    async def watched_open(self: FileLedger, job: Job) -> Checkpoint:
        found = await open_(self, job)
        if found.state is not None:
            _turns.commit(found.state.mark, list(found.ahead))
        return found

    async def watched_commit(self: FileLedger, commit: Commit) -> None:
        await commit_(self, commit)
        _turns.commit(commit.mark, [ahead.index for ahead in commit.ahead])

    FileLedger.open, FileLedger.commit = watched_open, watched_commit  # type: ignore[method-assign]


async def worker(item: str) -> dict[str, Any]:
    """Items are numbers: indices, and from 1,000 on those of another input, with the turns of their last digits."""
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, b"%7d\n" % int(item))
    os.close(log)
    if int(item) == FAILS:
        raise RuntimeError("as the test says")
    while not _turns.may_finish(int(item) % 1000):
        await _turns.more.wait()
    return result(int(item))


def result(item: int) -> dict[str, Any]:
    return {"number": item, "text": "é" * (item % 5)}
