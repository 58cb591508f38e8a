"""A ledger as an outsider may write it, a table of SQLite; and the same by an author who made a mistake."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec

from async_recovery import Ahead, Bookmark, Checkpoint, Commit, Job, Progress, RunSummary, State

TABLES = """
create table if not exists records (number integer primary key, record blob);
create table if not exists progress (only_row integer primary key check (only_row = 1), state blob, ahead blob);
create table if not exists finished (items integer);
"""


class TableLedger:
    """Records and progress in one database.

    :param mistake: ``"no transaction"``: records and progress are written apart; ``"too early"``: a commit is
        acknowledged at once, and written with the next.
    """

    form = "jsonl"
    keeps_checkpoint = False

    def __init__(self, path: Path, *, mistake: str = "") -> None:
        self.output: str | None = str(path)
        self._mistake = mistake
        self._held: list[Commit] = []
        self._ahead: dict[int, Ahead] = {}
        self._job: Job
        self._database: sqlite3.Connection

    async def open(self, job: Job) -> Checkpoint:
        self._job = job
        return await asyncio.to_thread(self._open)

    async def audit(self) -> None:
        pass

    async def commit(self, commit: Commit) -> None:
        self._held.append(commit)
        if self._mistake != "too early" or len(self._held) > 1:
            await asyncio.to_thread(self._commit, self._held.pop(0))

    async def show(self, progress: Progress) -> None:
        pass

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        for commit in self._held:
            await asyncio.to_thread(self._commit, commit)
        await asyncio.to_thread(self._database.execute, "insert into finished values (?)", (summary.total_items,))

    async def close(self) -> None:
        if hasattr(self, "_database"):
            await asyncio.to_thread(self._database.close)

    def _open(self) -> Checkpoint:
        assert self.output is not None
        self._database = sqlite3.connect(self.output, isolation_level=None, check_same_thread=False)
        self._database.executescript(TABLES)
        row = self._database.execute("select state, ahead from progress").fetchone()
        if row is None:
            return Checkpoint()
        self._ahead = {item.index: item for item in msgspec.json.decode(row[1], type=list[Ahead])}
        return Checkpoint(msgspec.json.decode(row[0], type=State), dict(self._ahead))

    def _commit(self, commit: Commit) -> None:
        run = self._database.execute
        self._ahead.update((item.index, item) for item in commit.ahead)
        self._ahead = {index: item for index, item in self._ahead.items() if index >= commit.mark}
        state = commit.state(self._job)
        if self._mistake != "no transaction":
            run("begin immediate")
        self._database.executemany("insert into records (record) values (?)", [(record,) for record in commit.records])
        ahead = msgspec.json.encode(list(self._ahead.values()))
        run("insert or replace into progress values (1, ?, ?)", (msgspec.json.encode(state), ahead))
        if self._mistake != "no transaction":
            run("commit")


def records_in(path: Path) -> list[bytes] | None:
    """The finished output."""
    database = sqlite3.connect(path)
    try:
        if not database.execute("select * from finished").fetchall():
            return None
        return [record for (record,) in database.execute("select record from records order by number")]
    finally:
        database.close()
