"""A ledger in a SQLite database: records, what is ahead of the mark, and the mark, in one transaction.

The schema, version 1. A run has at most two lives of its name: one that is not complete, and one that is, whose records
stay in the view until the other is complete and takes its name from it. Lives without a name are removed. Next to the
tables of others, in a database of one's own or not::

    async_recovery_schema   version
    async_recovery_run      id, name, complete, kept, checkpoint (a line as in a journal, see `checkpoint`)
    async_recovery_record   run, index, record (JSON)                      below the mark
    async_recovery_ahead    run, index, item_crc, record (JSON), crc       finished ahead of it
    async_recovery_spent    run, index, attempts, starts                   of items that are not finished
    async_recovery_results  run (its name), index, record                  a view: complete runs only

One connection, which only the ledger's own thread uses, in WAL mode with synchronous=FULL: a power cut loses nothing
that was acknowledged. Any error in a commit poisons the ledger: nothing more is written by this process. So the log is
copied into the database on our own word alone: when SQLite does that by itself it tells nobody of an fsync that failed,
and the next one, which succeeds, would be believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import anyio.to_thread
import msgspec

from .checkpoint import Bookmark, Checkpoint, Commit, Job, Spent
from .contracts import RunSummary
from .database import DEFAULT_RUN, SCHEMA, DatabaseLedger, Left, ahead_row
from .errors import (
    AlreadyRunning,
    AsyncRecoveryError,
    CheckpointUnusable,
    Mismatch,
    StorageFailed,
    UsageError,
    describe,
)
from .file_ledger import DISK_FAILED, NOT_ALLOWED, retry_of
from .files import DISK, WriterThread
from .lock import Lock
from .progress import Progress

logger = logging.getLogger("async_recovery.ledger")

T = TypeVar("T")

BUSY_TIMEOUT_S = 30.0
BATCH_ROWS = 500  # of one statement: each gives the interpreter up once, however many rows it has
SWEEP_ROWS = 50_000
LARGE_LOG_BYTES = 8 << 20
NAMES = ("", "-wal", "-shm")

TABLES = """
CREATE TABLE async_recovery_schema (version INTEGER NOT NULL);
CREATE TABLE async_recovery_run (
    id INTEGER PRIMARY KEY, name TEXT, complete INTEGER NOT NULL, kept INTEGER NOT NULL, checkpoint TEXT NOT NULL,
    UNIQUE (name, complete)
);
CREATE TABLE async_recovery_record (
    run INTEGER NOT NULL, "index" INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, "index")
) WITHOUT ROWID;
CREATE TABLE async_recovery_ahead (
    run INTEGER NOT NULL, "index" INTEGER NOT NULL, item_crc INTEGER NOT NULL, record TEXT NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (run, "index")
) WITHOUT ROWID;
CREATE TABLE async_recovery_spent (
    run INTEGER NOT NULL, "index" INTEGER NOT NULL, attempts INTEGER NOT NULL, starts INTEGER NOT NULL,
    PRIMARY KEY (run, "index")
) WITHOUT ROWID;
CREATE VIEW async_recovery_results AS
    SELECT run.name AS run, record."index" AS "index", record.record AS record
    FROM async_recovery_run AS run JOIN async_recovery_record AS record ON record.run = run.id
    WHERE run.complete AND run.name IS NOT NULL;
"""
PARTS = ("record", "ahead", "spent")


class SqliteLedger(DatabaseLedger):
    """Records and progress in a SQLite database, as a run of that name; one run at a time.

    :param path: of the database; it is made if it is not there.
    :param run: the run's name in it.
    :param input: and all others: as for `FileLedger`.
    :raises UsageError: if an argument can not be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run: str = DEFAULT_RUN,
        *,
        input: str | None = None,
        fresh: bool = False,
        keep_checkpoint: bool = False,
        on_damage: Literal["restart", "refuse"] = "restart",
    ) -> None:
        given = os.fsdecode(path)
        super().__init__(
            address_of(given, run), run, input=input, fresh=fresh, keep_checkpoint=keep_checkpoint, on_damage=on_damage
        )
        self._input = input
        self._path = given  # symlinks are resolved when it is opened
        self._thread = WriterThread()
        self._lock: Lock | None = None
        self._opened: sqlite3.Connection | None = None
        self._life: int | None = None
        self._has_spent = self._made = self._closed = False

    async def open(self, job: Job) -> Checkpoint:
        """See `Ledger.open`."""
        self._job = job
        found = await self._thread.run(self._naming_errors, self._open)
        if found.complete is not None:
            await self.audit()
        return found

    async def check_writable(self) -> None:
        """See `DatabaseLedger.check_writable`."""
        await anyio.to_thread.run_sync(self._check_writable)

    async def audit(self) -> None:
        """See `Ledger.audit`."""
        await self._refuse_change(self._joined, self._resumed_mark, self._resumed)

    async def commit(self, commit: Commit) -> None:
        """See `Ledger.commit`."""
        await self._on_thread(lambda: self._commit(commit))

    async def show(self, progress: Progress) -> None:
        """See `Ledger.show`: in the lock's file."""
        if self._lock is not None:
            await self._thread.run(self._lock.show, msgspec.to_builtins(progress))

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """See `Ledger.finish`."""
        self._refuse_if_poisoned()
        await self._refuse_change(self._joined, summary.total_items, self._written)
        await self._on_thread(lambda: self._finish(bookmark, summary))

    async def close(self) -> None:
        """See `Ledger.close`."""
        if not self._closed:
            self._closed = True
            await self._thread.run(self._close)
            self._thread.stop()

    async def _on_thread(self, job: Callable[[], T]) -> T:
        self._refuse_if_poisoned()
        try:
            return await self._thread.run(job)
        except (sqlite3.Error, OSError) as error:
            raise self._failed(describe(error)) from error

    async def _joined(self, first: int, end: int) -> bytes:
        try:
            return await self._thread.read(lambda: joined(self._connection, self._life, first, end))
        except sqlite3.Error as error:
            raise self._failed(describe(error)) from error

    def _naming_errors(self, job: Callable[[], T]) -> T:
        """What goes wrong at a start is told as what it is to the user; nothing was changed."""
        try:
            return job()
        except sqlite3.Error as error:
            raise (self._is_reachable() and told(error, self._path)) or self._failed(describe(error)) from error
        except OSError as error:
            if error.errno in NOT_ALLOWED:
                raise UsageError(
                    f"{error.filename} can not be used: {error.strerror}. Mend that, or name another database"
                ) from error
            raise self._failed(describe(error)) from error

    def _is_reachable(self) -> bool:
        """Whether the file system still answers: SQLite does not tell a file that it may not open from a dead disk."""
        try:
            if self._lock is not None:
                self._lock.look()
        except OSError:
            return False
        return True

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._opened is not None
        return self._opened

    # What follows runs on the writer thread.

    def _open(self) -> Checkpoint:
        self.check_paths()
        lock = Lock(f"{self._path}.lock", self.run)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno in DISK_FAILED:
                raise
            raise UsageError(f"the folder of {self._path} can not be written to: {describe(error)}") from error
        self._lock = lock
        if not is_file(self._path):
            return Checkpoint()
        self._refuse_read_only()
        self._connect("rw")
        with self._transaction():
            if not has_tables(self._connection, self._path):
                return Checkpoint()
            check_whole(self._connection, self._path)
            self._look_around()
            working, complete, left = look(self._connection, self.run)
            found = self._decide(left)
            self._life = complete if found.complete is not None else working
            self._has_spent = bool(left.spent)
        self._configure()
        return found

    def _look_around(self) -> None:
        """Refuse to do a run anew whose failed items are being run again."""
        _, _, left = look(self._connection, retry_of(self.run))
        if left.line is not None and not self._fresh:
            raise Mismatch(
                f"the failed items of {self._where} are being run again, and that is not finished: finish it with "
                "`async-recovery retry-failed`, or start anew with --fresh (fresh=True), which drops it"
            )

    def check_paths(self) -> None:
        """Resolve symlinks, and touch nothing.

        :raises UsageError: if the database, or the folder that it is to lie in, can not be used.
        """
        self._path = os.path.realpath(self._path)
        check_path(self._path)
        written = [f"{self._path}{name}" for name in (*NAMES, ".lock")]
        if self._input is not None and os.path.realpath(self._input) in written:
            raise UsageError(f"the input {self._input} would be overwritten: choose another --output")

    def _check_writable(self) -> None:
        self.check_paths()
        if not os.access(os.path.dirname(self._path), os.W_OK | os.X_OK):
            raise UsageError(f"the folder of {self._path} can not be written to: {os.strerror(errno.EACCES)}")
        if os.path.exists(self._path):
            self._refuse_read_only()

    def _refuse_read_only(self) -> None:
        """SQLite would open it all the same, and fail at the first commit."""
        if not os.access(self._path, os.W_OK):
            raise UsageError(f"{self._path} can not be written to: mend its permission, or name another database")

    def _connect(self, mode: str) -> None:
        self._opened = connect(self._path, mode)

    def _configure(self) -> None:
        """Make a commit durable when it returns; what was set is read back, since not every setting is obeyed."""
        run = self._connection.execute
        mode = run("PRAGMA journal_mode = WAL").fetchone()[0]
        run("PRAGMA synchronous = FULL")
        run("PRAGMA wal_autocheckpoint = 0")
        run(f"PRAGMA journal_size_limit = {LARGE_LOG_BYTES}")  # a log that begins anew is cut to it
        level = run("PRAGMA synchronous").fetchone()[0]
        if (mode, level) != ("wal", 2):
            raise UsageError(
                f"{self._path} has journal_mode={mode} and synchronous={level}, and must have wal and 2 (FULL): close "
                "what has it open, or choose a database on a local disk"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing, and a look at whether the sync is to be believed, as `files.make_durable` has it."""
        assert self._lock is not None
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
            self._lock.look()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # some errors have rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    def _copy_large_log(self) -> None:
        """Copy a write-ahead log that has grown large into the database, from where it begins anew."""
        assert self._lock is not None
        if os.stat(f"{self._path}-wal").st_size > LARGE_LOG_BYTES:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._lock.look()

    def _commit(self, commit: Commit) -> None:
        if self._durable_mark is None:
            self._begin(commit)
            return
        run, life = self._connection.execute, self._life
        first = commit.mark - len(commit.records)
        with self._transaction():
            self._insert(
                "record", ((life, index, record.decode()) for index, record in enumerate(commit.records, first))
            )
            if commit.records:
                run('DELETE FROM async_recovery_ahead WHERE run = ? AND "index" < ?', (life, commit.mark))
            self._insert("ahead", (row_of(life, *ahead_row(item)) for item in commit.ahead))
            self._replace_spent(commit)
            line = self._state_line(commit).decode()
            run("UPDATE async_recovery_run SET checkpoint = ? WHERE id = ?", (line, life))
        self._durable_mark = commit.mark
        self._copy_large_log()
        self._nothing_done = False

    def _insert(self, part: str, rows: Iterable[Sequence[Any]]) -> None:
        everything = list(rows)
        for start in range(0, len(everything), BATCH_ROWS):
            batch = everything[start : start + BATCH_ROWS]
            places = f"({','.join('?' * len(batch[0]))})"
            statement = f"INSERT OR REPLACE INTO async_recovery_{part} VALUES {','.join([places] * len(batch))}"
            self._connection.execute(statement, list(chain.from_iterable(batch)))

    def _replace_spent(self, commit: Commit) -> None:
        """What was spent, on items that are still not finished."""
        if not (commit.spent or self._has_spent):
            return
        rows = ((self._life, item.index, item.attempts, item.starts) for item in commit.spent)
        self._insert("spent", rows)
        self._connection.execute(
            'DELETE FROM async_recovery_spent WHERE run = ?1 AND ("index" < ?2 OR attempts + starts = 0 OR "index" IN '
            '(SELECT "index" FROM async_recovery_ahead WHERE run = ?1))',
            (self._life, commit.mark),
        )
        left = "SELECT EXISTS (SELECT 1 FROM async_recovery_spent WHERE run = ?)"
        self._has_spent = bool(self._connection.execute(left, (self._life,)).fetchone()[0])

    def _begin(self, commit: Commit) -> None:
        """The first commit of a fresh job: what is there of another is put aside, and a new life begins."""
        if self._opened is None:
            self._made = not os.path.lexists(self._path)
            self._connect("rwc")
        self._configure()
        run = self._connection.execute
        with self._transaction():
            if not has_tables(self._connection, self._path):
                for statement in TABLES.split(";\n"):
                    run(statement)
                run("INSERT INTO async_recovery_schema VALUES (?)", (SCHEMA,))
            aside = self._name_aside() if self._damaged else None
            run("UPDATE async_recovery_run SET name = ? WHERE name = ? AND NOT complete", (aside, self.run))
            retry = retry_of(self.run)
            run("UPDATE async_recovery_run SET name = NULL WHERE name = ? AND NOT complete", (retry,))
            values = (self.run, self._state_line(commit).decode())
            inserted = run("INSERT INTO async_recovery_run VALUES (NULL, ?, 0, 0, ?)", values)
            self._life = inserted.lastrowid
        self._durable_mark, self._nothing_done = 0, True
        DISK.fsync_directory(os.path.dirname(self._path))
        self._sweep()

    def _name_aside(self) -> str:
        taken = {name for (name,) in self._connection.execute("SELECT name FROM async_recovery_run")}
        number = 1
        while f"{self.run}.damaged-{number}" in taken:
            number += 1
        return f"{self.run}.damaged-{number}"

    def _sweep(self) -> None:
        """Remove the lives that have no name any more, some rows at a time: no transaction is large."""
        run = self._connection.execute
        for (life,) in run("SELECT id FROM async_recovery_run WHERE name IS NULL").fetchall():
            for part in PARTS:
                of_life = f"FROM async_recovery_{part} WHERE run = ?1"
                some = f'DELETE {of_life} AND "index" <= (SELECT min("index") {of_life}) + {SWEEP_ROWS}'
                while run(some, (life,)).rowcount > 0:
                    self._copy_large_log()
            run("DELETE FROM async_recovery_run WHERE id = ?", (life,))

    def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """Publish: from one moment to the next the view shows this life, and not the one before."""
        run, life = self._connection.execute, self._life
        with self._transaction():
            if counted(self._connection, life) != (summary.total_items, summary.total_items - 1):
                raise self._changed("records were added or removed")
            run("UPDATE async_recovery_run SET name = NULL WHERE name = ? AND complete", (self.run,))
            run(
                "UPDATE async_recovery_run SET complete = 1, kept = ?, checkpoint = ? WHERE id = ?",
                (self.keeps_checkpoint, self._complete_line(bookmark, summary).decode(), life),
            )
        self._nothing_done = False
        self._sweep_at_last()

    def _sweep_at_last(self) -> None:
        try:
            self._sweep()
        except (sqlite3.Error, OSError) as error:  # the job is complete all the same, and the next one removes it
            logger.warning("%s: what the old run left can not be removed: %s", self._path, describe(error))

    def _close(self) -> None:
        leaves_nothing = self._nothing_done and self._poison is None
        if self._opened is not None:
            with contextlib.suppress(sqlite3.Error):  # all that counts was made durable before
                if leaves_nothing and not self._made:
                    self._connection.execute("UPDATE async_recovery_run SET name = NULL WHERE id = ?", (self._life,))
                    self._sweep()
                if isinstance(self._poison, StorageFailed):
                    close_without_copying(self._connection)
                else:
                    self._connection.close()
            self._opened = None
        if leaves_nothing and self._made:
            for name in NAMES:
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._path}{name}")
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def address_of(path: str, run: str) -> str:
    """What to call a run in a database as an output."""
    named = "" if run == DEFAULT_RUN else f"?run={quote(run)}"
    return f"sqlite:///{quote(os.fsencode(path))}{named}"


def connect(path: str, mode: str, *, immutable: bool = False) -> sqlite3.Connection:
    """A connection to the database at `path`; `mode` and `immutable` as in SQLite's own addresses of files."""
    address = f"file:{quote(os.fsencode(path))}?mode={mode}{'&immutable=1' if immutable else ''}"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)


def close_without_copying(connection: sqlite3.Connection) -> None:
    """Close it and leave the log as it is, which SQLite would copy; before Python 3.12 it has to stay open for good."""
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)  # noqa: FBT003
        connection.close()
    else:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def is_file(path: str) -> bool:
    """Whether there is a database that was begun; an empty file is none."""
    return os.path.exists(path) and os.path.getsize(path) > 0


def check_path(path: str) -> None:
    """:raises UsageError: if no database can lie at `path`, symlinks resolved. Touches nothing."""
    folder = os.path.dirname(path)
    if not _is_a(stat.S_ISDIR, folder):
        raise UsageError(f"there is no folder {folder}: make it first, or name another database")
    if os.path.lexists(path):
        if not _is_a(stat.S_ISREG, path):
            raise UsageError(f"{path} is not a regular file: name a database")
        if os.stat(path).st_nlink > 1:
            raise UsageError(f"{path} has several names (hard links), and SQLite can be used under one alone")


def _is_a(kind: Callable[[int], bool], path: str) -> bool:
    """Whether that lies there; a disk that can not tell is an OSError, unlike for `os.path`."""
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def has_tables(connection: sqlite3.Connection, path: str) -> bool:
    """Whether the tables of this package are there.

    :raises CheckpointUnusable: if they are those of another version.
    """
    named = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'async_recovery_schema')"
    if not connection.execute(named).fetchone()[0]:
        return False
    versions = [version for (version,) in connection.execute("SELECT version FROM async_recovery_schema")]
    if versions != [SCHEMA]:
        found = ", ".join(map(str, versions)) or "none"
        raise CheckpointUnusable(
            f"the tables of async_recovery in {path} have the version {found}, this one reads {SCHEMA}: use the "
            "version of async_recovery that made them, or another database"
        )
    return True


def check_whole(connection: sqlite3.Connection, path: str) -> None:
    """See that the database is whole.

    :raises CheckpointUnusable: if it is damaged.
    :raises sqlite3.OperationalError: if a page can not be read: the disk has failed, and nobody knows what is there.
    """
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found == "ok":
        return
    shown = " ".join(str(found).split())
    if _is_unread(shown):
        raise sqlite3.OperationalError(f"disk I/O error ({shown})")
    raise _damaged(path, shown)


def _is_unread(shown: str) -> bool:
    """Whether these are the words of a check that met an error of the disk, which is no damage."""
    code = re.search(r"error code=(\d+)", shown)
    return "failed to get page" in shown or (code is not None and int(code[1]) & 0xFF == sqlite3.SQLITE_IOERR)


def look(connection: sqlite3.Connection, run: str) -> tuple[int | None, int | None, Left]:
    """What a run has left: the life that is being worked on, the complete one, and all that is to be known of them."""
    lives = "SELECT complete, id, checkpoint, kept FROM async_recovery_run WHERE name = ?"
    found = {complete: rest for complete, *rest in connection.execute(lives, (run,))}
    working, line, _ = found.get(0, (None, None, 0))
    complete, complete_line, kept = found.get(1, (None, None, 0))
    records, last = counted(connection, working)
    ahead = 'SELECT "index", item_crc, record, crc FROM async_recovery_ahead WHERE run = ?'
    spent = 'SELECT "index", attempts, starts FROM async_recovery_spent WHERE run = ?'
    left = Left(
        line=None if line is None else line.encode(),
        records=records,
        last=last,
        ahead=[
            (index, item_crc, str(record).encode(), crc)
            for index, item_crc, record, crc in connection.execute(ahead, (working,))
        ],
        spent=[Spent(*row) for row in connection.execute(spent, (working,))],
        complete_line=None if complete_line is None else complete_line.encode(),
        kept=bool(kept),
    )
    return working, complete, left


def counted(connection: sqlite3.Connection, life: int | None) -> tuple[int, int]:
    """How many records a life has, and the highest index of one."""
    query = 'SELECT count(*), coalesce(max("index"), -1) FROM async_recovery_record WHERE run = ?'
    records, last = connection.execute(query, (life,)).fetchone()
    return records, last


def joined(connection: sqlite3.Connection, life: int | None, first: int, end: int) -> bytes:
    """The records from `first` up to `end`, in order, each with a line end; in one step, as a row of its own each costs
    the interpreter's lock."""
    query = (
        "SELECT group_concat(record, char(10)) FROM (SELECT record FROM async_recovery_record "
        'WHERE run = ? AND "index" >= ? AND "index" < ? ORDER BY "index")'
    )
    (lines,) = connection.execute(query, (life, first, end)).fetchone()
    return b"" if lines is None else str(lines).encode() + b"\n"


def row_of(life: int | None, index: int, item_crc: int, record: bytes, crc: int) -> tuple[Any, ...]:
    """A row of what is ahead."""
    return life, index, item_crc, record.decode(), crc


def told(error: sqlite3.Error, path: str) -> AsyncRecoveryError | None:
    """The error of a user's mistake, or of what was found; None: the storage failed."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return UsageError(f"{path} is no SQLite database: name another file")
    if code == sqlite3.SQLITE_CORRUPT:
        return _damaged(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return AlreadyRunning(f"{path} is locked by another program that writes to it: try again when it has ended")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return UsageError(
            f"{path} can not be used: {error}. Mend that (permission of file and folder?), or name another"
        )
    return None


def _damaged(path: str, what: str) -> CheckpointUnusable:
    return CheckpointUnusable(
        f"the database {path} is damaged ({what}): restore it from a backup, or name another; nothing was changed"
    )
