"""A run in a SQLite database as it lies there, read without touching it, also while a run goes on."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio.to_thread

from .database import Left, Snapshot
from .errors import AsyncRecoveryError, StorageFailed, UsageError
from .file_ledger import retry_of
from .files import WriterThread
from .ledgers import NoSuchRun
from .lock import Holder, read_holder
from .sqlite import check_path, check_whole, connect, has_tables, is_file, joined, look, told

T = TypeVar("T")

MOST_LOOKS = 10


class SqliteSnapshot:
    """See `Snapshot`: one read transaction, on a thread of its own.

    :param path: of the database, symlinks resolved.
    :param run: the run's name.
    """

    def __init__(self, path: str, run: str) -> None:
        self.left = Left()
        self.runs: list[str] = []
        self.holder: Holder | None = None
        self._path = path
        self.run = run
        self._thread = WriterThread()
        self._connection: sqlite3.Connection
        self._lives: tuple[int | None, int | None] = (None, None)

    async def look_through(self, look: Callable[[Snapshot], Awaitable[T]], *, immutable: bool, whole: bool) -> T:
        """Open the database, and let `look` see it.

        :param immutable: nobody writes to it: then nothing is made beside it, as SQLite does even to read it.
        :param whole: see that all of the database is whole first.
        """
        try:
            await self._thread.run(self._open, immutable, whole)
            return await look(self)
        finally:
            await self._thread.run(self._close)
            self._thread.stop()

    async def joined(self, first: int, end: int, *, complete: bool) -> bytes:
        """See `Snapshot.joined`."""
        return await self._thread.run(joined, self._connection, self._lives[complete], first, end)

    def _open(self, immutable: bool, whole: bool) -> None:
        self._connection = connect(self._path, "ro", immutable=immutable)
        self._connection.execute("BEGIN")
        if not has_tables(self._connection, self._path):
            return
        if whole:
            check_whole(self._connection, self._path)
        names = "SELECT DISTINCT name FROM async_recovery_run WHERE name IS NOT NULL ORDER BY name"
        self.runs = [name for (name,) in self._connection.execute(names)]
        working, complete, self.left = look(self._connection, self.run)
        self._lives = working, complete
        holder = read_holder(f"{self._path}.lock")
        runs = (self.run, retry_of(self.run))  # a retry holds the run whose failed items it runs
        self.holder = holder if holder is not None and holder.run in runs else None

    def _close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()


async def look_at(path: str, run: str, look: Callable[[Snapshot], Awaitable[T]], *, whole: bool = False) -> T:
    """Let `look` see a run in the database at `path`. It is called again if a run begins or ends meanwhile.

    :param whole: see that all of the database is whole first.
    :raises UsageError: if there is none, or it can not be read.
    """
    run_sync = anyio.to_thread.run_sync
    path, is_there = await run_sync(_find, path)
    if not is_there:
        raise NoSuchRun(f"there is no database {path}: name one that a run has made, sqlite:///FILE[?run=NAME]")
    for _ in range(MOST_LOOKS):
        before = await run_sync(_stamp, path)
        try:
            found = await SqliteSnapshot(path, run).look_through(look, immutable=before is not None, whole=whole)
        except (sqlite3.Error, AsyncRecoveryError) as error:
            if before != await run_sync(_stamp, path):
                continue
            if isinstance(error, sqlite3.Error):
                raise await run_sync(_unreadable, path, error) from error
            raise
        if before == await run_sync(_stamp, path):
            return found
    raise StorageFailed(f"{path} changes too often to be read: try again")


def _unreadable(path: str, error: sqlite3.Error) -> AsyncRecoveryError:
    """What to say of it."""
    log, index = f"{path}-wal", f"{path}-shm"
    if os.path.exists(log) and not os.path.exists(index) and not os.access(os.path.dirname(path), os.W_OK):
        return UsageError(
            f"{path} can not be read where it lies: to read its log {log}, SQLite has to make {index} beside it. Allow "
            "the folder to be written to, or copy the first two to another one and look there"
        )
    return told(error, path) or UsageError(f"{path} can not be read: {error}")


def _find(path: str) -> tuple[str, bool]:
    """The path, symlinks resolved, and whether there is a database."""
    path = os.path.realpath(path)
    try:
        check_path(path)
        return path, is_file(path)
    except OSError as error:
        raise UsageError(f"{error.filename or path} can not be read: {error.strerror}") from error


def _stamp(path: str) -> tuple[int, ...] | None:
    """Changes whenever somebody writes to a database that nobody has open; None: somebody has, or had until a crash."""
    if os.path.exists(f"{path}-wal"):
        return None
    there = os.stat(path)
    return there.st_ino, there.st_size, there.st_mtime_ns
