"""What the service remembers of its jobs, in SQLite below its folder: one row a job, durable when a call returns.

The rows are few and small: all of them are read at the start, and each change writes one. The progress of a job is not
in here, that is its checkpoint's business.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ..errors import CheckpointUnusable, StorageFailed
from ..files import WriterThread
from .jobs import Job

T = TypeVar("T")

SCHEMA = 1
_CREATE = (
    "CREATE TABLE IF NOT EXISTS jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, job BLOB NOT NULL)"
)


class Store:
    """The table of jobs in the database at `path`; made if it is not there.

    All methods raise StorageFailed if the database can not be read or written, or is closed: nothing of that call was
    done then.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = WriterThread()
        self._opened: sqlite3.Connection | None = None
        self._is_closed = False

    async def open(self) -> list[Job]:
        """Every job that is remembered, by its number.

        :raises CheckpointUnusable: if the database is no such one, or a later version's.
        """
        try:
            return await self._run(self._open)
        except StorageFailed as error:
            if isinstance(error.__cause__, sqlite3.OperationalError):
                raise
            raise CheckpointUnusable(
                f"{self._path} can not be read as the service's database: {error.__cause__}. Restore it, or move it "
                "aside: the outputs and checkpoints of its jobs lie beside it, in jobs/"
            ) from error

    async def save(self, job: Job) -> None:
        """Remember `job` as it is now."""
        await self._run(lambda: self._write("UPDATE jobs SET job = ? WHERE number = ?", _encode(job), job.number))

    async def add(self, job: Job) -> None:
        """Remember a new job."""
        sql = "INSERT INTO jobs (number, id, job) VALUES (?, ?, ?)"
        await self._run(lambda: self._write(sql, job.number, job.id, _encode(job)))

    async def remove(self, job: Job) -> None:
        """Forget a job."""
        await self._run(lambda: self._write("DELETE FROM jobs WHERE number = ?", job.number))

    async def next_number(self) -> int:
        """One more than any job has ever had."""
        return await self._run(self._next_number)

    async def close(self) -> None:
        """Close the database."""
        self._is_closed = True
        if self._opened is not None:
            await self._thread.run(self._opened.close)
        self._thread.stop()

    async def _run(self, job: Callable[[], T]) -> T:
        if self._is_closed:
            raise StorageFailed(f"the service's database {self._path} is closed: the service has stopped")
        try:
            return await self._thread.run(job)
        except sqlite3.Error as error:
            raise StorageFailed(f"the service's database {self._path} failed: {error}. Nothing was changed") from error

    # What follows runs on the thread.

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._opened is not None
        return self._opened

    def _open(self) -> list[Job]:
        self._opened = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5)
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise CheckpointUnusable(
                f"{self._path} was written by a later version (schema {version}, this one has {SCHEMA}): use that one"
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(_CREATE)
        self._connection.execute(f"PRAGMA user_version = {SCHEMA}")
        rows = self._connection.execute("SELECT job FROM jobs ORDER BY number").fetchall()
        try:
            return [msgspec.json.decode(row, type=Job) for (row,) in rows]
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise sqlite3.DatabaseError(f"a row of it is no job ({error})") from error

    def _write(self, sql: str, *values: object) -> None:
        self._connection.execute(sql, values)

    def _next_number(self) -> int:
        row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
        return (row[0] if row else 0) + 1


_encode = msgspec.json.encode
