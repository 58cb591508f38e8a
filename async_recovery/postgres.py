"""A ledger in a PostgreSQL database: records, what is ahead of the mark, and the mark, in one transaction.

The tables are those of `postgres_tables`. Any number of runs share them at the same time, each with a name.

A commit: rows by COPY, then one row of `async_recovery_fence`: ``SET mark = new, generation = old + 1 WHERE epoch =
mine AND generation = old``. Not that row: another process has taken the run over, and all of the commit is rolled back;
this process stops. So who was stopped, or cut off, and wakes up later, writes nothing.

A connection that is lost in a commit leaves open whether it was done. A new connection takes over from oneself: ``SET
epoch = epoch + 1 WHERE owner = me``, which waits for the old transaction, and whose generation tells. Only if it is
still the old one the same commit is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from math import inf
from typing import Any, Literal, TypeVar
from uuid import uuid4

import msgspec

from .checkpoint import Bookmark, Checkpoint, Commit, Job
from .contracts import RunSummary
from .database import DatabaseLedger, ahead_row
from .errors import AlreadyRunning, AsyncRecoveryError, Mismatch, UsageError, describe, storage_failed
from .file_ledger import retry_of
from .ledgers import public, split_address
from .lock import Holder
from .postgres_session import FAILED, HASTE_S, LOST, PATIENCE_S, Session, delays, told
from .postgres_tables import COLUMNS, KEY, PARTS, TABLES, WRITTEN, counted, has_tables, holder_of, joined, look
from .progress import Progress

logger = logging.getLogger("async_recovery.ledger")

T = TypeVar("T")

SWEEP_ROWS = 50_000
SHOW_S = 2.0
LOCK_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
TABLES_KEY = "hashtextextended('async_recovery', 0)"

Write = Callable[[Any], Awaitable[object]]
"""The statements of one transaction, on that connection. It may be called again after a connection was lost."""


class _Fenced(Exception):
    """Not one row: what was this process's belongs to another."""


class PostgresLedger(DatabaseLedger):
    """Records and progress in a PostgreSQL database.

    :param address: of the database, with the name of the run: ``postgresql://USER@HOST/DATABASE?run=NAME``.
    :param input: and all others: as for `FileLedger`.
    :param patience_s: how long a lost connection is tried to be made again, in seconds; then the storage has failed.
    :param sleep: waits between two tries.
    :raises UsageError: if an argument can not be used, or asyncpg is not installed.
    """

    def __init__(
        self,
        address: str,
        *,
        input: str | None = None,
        fresh: bool = False,
        keep_checkpoint: bool = False,
        on_damage: Literal["restart", "refuse"] = "restart",
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        super().__init__(
            public(address),
            split_address(address)[1],
            input=input,
            fresh=fresh,
            keep_checkpoint=keep_checkpoint,
            on_damage=on_damage,
        )
        self._session = Session(address, f"async-recovery {self.run}")
        self.address = address
        self._patience_s, self._sleep = patience_s, sleep
        self._bound: asyncio.Timeout | None = None
        self._owner = uuid4().hex
        self._holder = Holder(os.getpid(), socket.gethostname(), time.time(), run=self.run)
        self._epoch: int | None = None
        self._generation = 0
        self._life: int | None = None
        self._damaged_ahead: list[int] = []
        self._has_tables = self._has_lock = self._has_spent = self._closed = False

    async def open(self, job: Job) -> Checkpoint:
        """See `Ledger.open`."""
        self._job = job
        found = await self._session.run(self._open)
        if found.complete is not None:
            await self.audit()
        return found

    async def check_writable(self) -> None:
        """See `DatabaseLedger.check_writable`."""
        try:
            await self._session.run(self._check_writable)
        finally:
            await self._session.stop()

    async def audit(self) -> None:
        """See `Ledger.audit`."""
        await self._refuse_change(self._joined, self._resumed_mark, self._resumed)

    async def commit(self, commit: Commit) -> None:
        """See `Ledger.commit`."""
        await self._in_session(lambda: self._commit(commit))

    def hasten(self) -> None:
        """See `Patient`: what has begun is given as long as what begins from now on."""

        def shorten() -> None:
            if self._bound is not None:
                self._bound.reschedule(min(self._bound.when() or inf, self._now() + self._patience_s))

        if self._patience_s > HASTE_S:
            self._patience_s = HASTE_S
            self._session.soon(shorten)

    async def show(self, progress: Progress) -> None:
        """See `Ledger.show`: in the row of the fence."""
        await self._session.run(lambda: self._show(progress))

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """See `Ledger.finish`."""
        self._refuse_if_poisoned()
        await self._refuse_change(self._joined, summary.total_items, self._written)
        await self._in_session(lambda: self._finish(bookmark, summary))

    async def close(self) -> None:
        """See `Ledger.close`."""
        if not self._closed:
            self._closed = True
            await self._session.run(self._leave_nothing)
            await self._session.stop()

    async def _in_session(self, job: Callable[[], Awaitable[T]]) -> T:
        self._refuse_if_poisoned()
        try:
            return await self._session.run(job)
        except FAILED as error:
            raise self._failed(describe(error)) from error

    async def _joined(self, first: int, end: int) -> bytes:
        async def read() -> bytes:
            return await self._surviving(lambda: joined(self._session.connection, self._life, first, end))

        self._refuse_if_poisoned()
        try:
            return await self._session.read(read)
        except FAILED as error:
            raise self._failed(describe(error)) from error

    # What follows runs on the session's loop.

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """What goes wrong at a start is told as what it is to the user."""
        try:
            yield
        except AsyncRecoveryError:
            raise
        except (ValueError, *FAILED) as error:
            raise told(error, self._session.shown) from error

    async def _open(self) -> Checkpoint:
        with self._naming_errors():
            connection = await self._session.connect()
            await self._look_for_tables(connection)
            await self._check_rights(connection)
            await self._wait_for_lock(connection)
            if not self._has_lock:
                raise AlreadyRunning(await self._who_holds(connection))
            if not self._has_tables:
                return Checkpoint()
            async with connection.transaction():
                return await self._take_over(connection)

    async def _check_writable(self) -> None:
        with self._naming_errors():
            connection = await self._session.connect()
            self._has_tables = await has_tables(connection, self._session.shown)
            await self._check_rights(connection)

    async def _take_over(self, connection: Any) -> Checkpoint:
        """From whoever had the run before, unless what is there is not to be resumed."""
        fence = "SELECT epoch FROM async_recovery_fence WHERE name = $1 FOR UPDATE"
        is_fenced = await connection.fetchval(fence, self.run) is not None
        await self._look_around(connection)
        working, complete, left = await look(connection, self.run)
        found = self._decide(left)
        self._life = working if found.complete is None else complete
        self._has_spent = bool(left.spent)
        self._damaged_ahead = [row[0] for row in left.ahead if row[0] not in left.whole_ahead]
        if is_fenced or working or complete:
            self._epoch, self._generation = await connection.fetchrow(
                "INSERT INTO async_recovery_fence AS fence VALUES ($1, 1, $2, 0, 0, $3) ON CONFLICT (name) DO UPDATE "
                "SET epoch = fence.epoch + 1, owner = $2, holder = $3 RETURNING epoch, generation",
                *(self.run, self._owner, self._note()),
            )
        return found

    async def _look_around(self, connection: Any) -> None:
        """Refuse to do a run anew whose failed items are being run again."""
        _, _, left = await look(connection, retry_of(self.run))
        if left.line is not None and not self._fresh:
            raise Mismatch(
                f"the failed items of {self._where} are being run again, and that is not finished: finish it with "
                "`async-recovery retry-failed`, or start anew with --fresh (fresh=True), which drops it"
            )

    async def _check_rights(self, connection: Any) -> None:
        """:raises UsageError: if this user can not write here."""
        if await connection.fetchval("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"):
            raise UsageError(f"{self._session.shown} may only be read: name the server that is written to")
        if self._has_tables:
            tables = [f"async_recovery_{part}" for part in WRITTEN]
            may = (
                "SELECT bool_and(has_table_privilege(part, r)) FROM unnest($1::text[]) AS part, unnest($2::text[]) AS r"
            )
            allowed = await connection.fetchval(may, tables, ["SELECT", "INSERT", "UPDATE", "DELETE"])
        else:
            may = "SELECT has_schema_privilege(current_schema(), 'CREATE'), current_setting('search_path')"
            allowed, search_path = await connection.fetchrow(may)
            if allowed is None:
                raise UsageError(
                    f"{self._session.shown} has no schema for the tables: of the search_path {search_path} none exists "
                    "that the user may use. Make it (CREATE SCHEMA), or name another"
                )
        if not allowed:
            what = "write to the tables of async_recovery" if self._has_tables else "make tables"
            raise UsageError(f"the user of {self._session.shown} may not {what}: grant it, or name another user")

    async def _wait_for_lock(self, connection: Any) -> None:
        """For a moment: the server may not yet have noticed the end of a process that was killed just before."""
        for delay_s in LOCK_DELAYS_S:
            if self._has_lock:
                break
            await self._sleep(delay_s)
            await self._look_for_tables(connection)

    async def _look_for_tables(self, connection: Any) -> None:
        """Take the lock, and see whether there are tables."""
        self._has_lock = await self._try_lock(connection)
        self._has_tables = self._has_tables or await has_tables(connection, self._session.shown)
        if self._has_tables:  # which may be new, and in another schema: the lock is that of where they are
            self._has_lock = await self._try_lock(connection)

    async def _try_lock(self, connection: Any) -> bool:
        """The lock of the run; for a retry then also its own, which tells others that it is the retry that works."""
        names = [self._target, self.run] if self.is_retry else [self.run]
        for name in names:
            if not await connection.fetchval(f"SELECT pg_try_advisory_lock({KEY})", name):
                return False
        return True

    async def _who_holds(self, connection: Any) -> str:
        found = await holder_of(connection, self._target) if self._has_tables else None
        who = f"process {found.pid} on {found.host}" if found is not None and found.pid else "another process"
        return (
            f"{self._where} is held by {who}: another run is working on it. Wait for its end, or give this run "
            "another name (?run=…)"
        )

    async def _surviving(self, work: Callable[[], Awaitable[T]], is_done: Callable[[], T | None] = lambda: None) -> T:
        """Do `work`, and again with a new connection when the old one is lost; unless `is_done` then."""
        before, last, was_fenced = self._generation, None, False

        async def again(delay_s: float) -> T:
            if delay_s:
                await self._sleep(delay_s)
            if not self._session.is_connected:
                await self._reconnect(before)
                if (done := is_done()) is not None:
                    return done
            return await work()

        began = self._now()
        for delay_s in delays(self._patience_s):
            try:
                return await self._until(began + self._patience_s, again(delay_s))
            except LOST as error:
                self._session.drop()
                if last is None:
                    logger.warning(
                        "%s: the connection is lost (%s): it is made again, and the workers go on as far as the window "
                        "reaches",
                        *(self._session.shown, describe(error)),
                    )
                is_over = self._now() >= began + self._patience_s
                if last is None or not is_over:  # that the time is over says less
                    last = error
                if is_over:
                    break
            except _Fenced:
                # Where the very first commit is in doubt, the row that is in the way can be this process's own.
                if self._epoch is not None or last is None or was_fenced:
                    raise self._stop() from None
                was_fenced = True
                self._session.drop()
        assert last is not None
        raise last

    async def _until(self, end: float, job: Awaitable[T]) -> T:
        """:raises TimeoutError: at that time of the loop; there is no connection then."""
        task = asyncio.ensure_future(job)
        try:
            async with asyncio.timeout_at(end) as self._bound:
                return await asyncio.shield(task)
        finally:
            self._bound = None
            if not task.done():
                self._session.drop()  # or the cancellation is told to the server, and its answer waited for
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _reconnect(self, generation: int) -> None:
        """A new connection, and take over from oneself.

        :param generation: the one before what was being done; one more: it was done.
        """
        connection = await self._session.connect()
        await self._look_for_tables(connection)
        if self._has_tables:
            mine = await connection.fetchrow(
                "UPDATE async_recovery_fence SET epoch = epoch + 1 WHERE name = $1 AND owner = $2 RETURNING epoch, "
                "generation",
                *(self.run, self._owner),
            )
            if mine is not None:
                self._epoch, self._generation = mine
            elif self._epoch is not None:
                raise _Fenced
        if self._generation not in (generation, generation + 1):
            self._poison = storage_failed(
                f"{self._session.shown} has come back without what it had acknowledged (generation "
                f"{self._generation}, not {generation})",
                self._durable_mark,
            )
            raise self._poison
        logger.info("%s: connected again", self._session.shown)

    async def _durably(self, write: Write, mark: int) -> None:
        """One transaction, all of it or nothing, done once: see the module."""
        self._refuse_if_poisoned()
        before = self._generation

        async def transaction() -> bool:
            connection = self._session.connection
            if not self._has_lock:  # the server had not yet noticed that the session before was gone
                self._has_lock = await self._try_lock(connection)
            async with connection.transaction():
                await connection.execute("SET LOCAL synchronous_commit = on")
                await write(connection)
                await self._pass_fence(connection, mark, before)
            self._generation = before + 1
            return True

        await self._surviving(transaction, lambda: self._generation == before + 1 or None)
        self._durable_mark = mark

    async def _pass_fence(self, connection: Any, mark: int, generation: int) -> None:
        """:raises _Fenced: if the run is another process's now."""
        if self._epoch is None:
            inserted = await connection.fetchval(
                "INSERT INTO async_recovery_fence VALUES ($1, 1, $2, 1, $3, $4) ON CONFLICT (name) DO NOTHING "
                "RETURNING epoch",
                *(self.run, self._owner, mark, self._note()),
            )
            if inserted is None:
                raise _Fenced
            return
        done = await connection.execute(
            "UPDATE async_recovery_fence SET mark = $1, generation = $2 + 1 WHERE name = $3 AND epoch = $4 AND "
            "generation = $2",
            *(mark, generation, self.run, self._epoch),
        )
        if done != "UPDATE 1":
            raise _Fenced

    def _stop(self) -> AsyncRecoveryError:
        self._poison = AlreadyRunning(
            f"{self._where} was taken over by another process while this one was cut off or stood still: this one has "
            "stopped, and what it did since is not kept"
        )
        return self._poison

    def _note(self) -> str:
        return msgspec.json.encode(self._holder).decode()

    async def _show(self, progress: Progress) -> None:
        self._holder.progress = msgspec.to_builtins(progress)
        if self._epoch is None or self._poison is not None or not self._session.is_connected:
            return
        connection = self._session.connection

        async def write() -> None:
            async with connection.transaction():
                await connection.execute("SET LOCAL synchronous_commit = off")
                await connection.execute(
                    "UPDATE async_recovery_fence SET holder = $1 WHERE name = $2 AND epoch = $3",
                    *(self._note(), self.run, self._epoch),
                )

        try:
            await self._until(self._now() + SHOW_S, write())
        except FAILED as error:  # the next commit says more, if it is of importance
            logger.debug("%s: progress can not be shown: %s", self._session.shown, describe(error))
            self._session.drop()

    async def _commit(self, commit: Commit) -> None:
        if self._durable_mark is None:
            await self._begin(commit)
            return
        line, first = self._state_line(commit).decode(), commit.mark - len(commit.records)

        async def write(connection: Any) -> None:
            life = self._life
            records = ((life, index, record.decode()) for index, record in enumerate(commit.records, first))
            await self._copy(connection, "record", records, commit.records)
            if commit.records:
                passed = 'DELETE FROM async_recovery_ahead WHERE run = $1 AND "index" >= $2 AND "index" < $3'
                await connection.execute(passed, life, first, commit.mark)
            if self._damaged_ahead:
                damaged = 'DELETE FROM async_recovery_ahead WHERE run = $1 AND "index" = ANY($2::bigint[])'
                await connection.execute(damaged, life, self._damaged_ahead)
            ahead = ((life, row[0], row[1], row[2].decode(), row[3]) for row in map(ahead_row, commit.ahead))
            await self._copy(connection, "ahead", ahead, commit.ahead)
            await self._replace_spent(connection, commit)
            await connection.execute("UPDATE async_recovery_run SET checkpoint = $2 WHERE id = $1", life, line)

        await self._durably(write, commit.mark)
        self._damaged_ahead = []
        self._nothing_done = False

    async def _copy(self, connection: Any, part: str, rows: Iterable[tuple[Any, ...]], of: list[Any]) -> None:
        """Rows of what stands in `of`, if anything does."""
        if of:
            await connection.copy_records_to_table(f"async_recovery_{part}", records=rows, columns=COLUMNS[part])

    async def _replace_spent(self, connection: Any, commit: Commit) -> None:
        """What was spent, on items that are still not finished."""
        if not (commit.spent or self._has_spent):
            return
        indices = [item.index for item in commit.spent]
        of_life = "DELETE FROM async_recovery_spent AS spent WHERE run = $1"
        await connection.execute(f'{of_life} AND "index" = ANY($2::bigint[])', self._life, indices)
        rows = ((self._life, item.index, item.attempts, item.starts) for item in commit.spent)
        await self._copy(connection, "spent", rows, commit.spent)
        await connection.execute(
            f'{of_life} AND ("index" < $2 OR attempts + starts = 0 OR EXISTS (SELECT 1 FROM async_recovery_ahead AS '
            'ahead WHERE ahead.run = $1 AND ahead."index" = spent."index"))',
            *(self._life, commit.mark),
        )
        left = "SELECT EXISTS (SELECT 1 FROM async_recovery_spent WHERE run = $1)"
        self._has_spent = await connection.fetchval(left, self._life)

    async def _begin(self, commit: Commit) -> None:
        """The first commit of a fresh job: what is there of another is put aside, and a new life begins."""
        line = self._state_line(commit).decode()

        async def write(connection: Any) -> None:
            await connection.execute(f"SELECT pg_advisory_xact_lock({TABLES_KEY})")  # of two that begin one makes them
            if not await has_tables(connection, self._session.shown):
                await connection.execute(TABLES)
            self._has_lock = await self._try_lock(connection)  # another may have made them, in a schema of its own
            rename = "UPDATE async_recovery_run SET name = $2 WHERE name = $1 AND NOT complete"
            await connection.execute(rename, self.run, await self._name_aside(connection) if self._damaged else None)
            await connection.execute(rename, retry_of(self.run), None)
            insert = "INSERT INTO async_recovery_run VALUES (DEFAULT, $1, false, false, $2) RETURNING id"
            self._life = await connection.fetchval(insert, self.run, line)

        await self._durably(write, 0)
        if self._epoch is None:
            self._epoch = 1
        self._has_tables = self._nothing_done = True
        self._has_spent, self._damaged_ahead = False, []
        await self._sweep()

    async def _name_aside(self, connection: Any) -> str:
        taken = {name for (name,) in await connection.fetch("SELECT name FROM async_recovery_run")}
        number = 1
        while f"{self.run}.damaged-{number}" in taken:
            number += 1
        return f"{self.run}.damaged-{number}"

    async def _sweep(self) -> None:
        """Remove the lives that have no name any more, some rows at a time; what fails, a later job removes."""
        try:
            run = self._session.connection
            for (life,) in await run.fetch("SELECT id FROM async_recovery_run WHERE name IS NULL"):
                for part in PARTS:
                    of_life = f"FROM async_recovery_{part} WHERE run = $1"
                    some = f'DELETE {of_life} AND "index" <= (SELECT min("index") {of_life}) + {SWEEP_ROWS}'
                    while await run.execute(some, life) != "DELETE 0":
                        pass
                await run.execute("DELETE FROM async_recovery_run WHERE id = $1", life)
        except FAILED as error:
            logger.info("%s: what an old run left is removed later: %s", self._session.shown, describe(error))

    async def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """Publish: from one moment to the next the view shows this life, and not the one before."""
        line = self._complete_line(bookmark, summary).decode()

        async def write(connection: Any) -> None:
            if await counted(connection, self._life) != (summary.total_items, summary.total_items - 1):
                raise self._changed("records were added or removed")
            run = connection.execute
            await run("UPDATE async_recovery_run SET name = NULL WHERE name = $1 AND complete", self.run)
            await run(
                "UPDATE async_recovery_run SET complete = true, kept = $2, checkpoint = $3 WHERE id = $1",
                *(self._life, self.keeps_checkpoint, line),
            )

        await self._durably(write, summary.total_items)
        self._nothing_done = False
        await self._sweep()

    async def _leave_nothing(self) -> None:
        """Of a job of which nothing is done; only if that can be done at once."""
        if not self._nothing_done or self._poison is not None or not self._session.is_connected:
            return
        connection = self._session.connection

        async def write() -> None:
            async with connection.transaction():
                await self._pass_fence(connection, 0, self._generation)
                await connection.execute("UPDATE async_recovery_run SET name = NULL WHERE id = $1", self._life)
                await connection.execute(
                    "DELETE FROM async_recovery_fence WHERE name = $1 AND NOT EXISTS (SELECT 1 FROM async_recovery_run "
                    "WHERE name = $1)",
                    self.run,
                )

        try:
            await self._until(self._now() + SHOW_S, write())
        except (_Fenced, *FAILED):
            return
        await self._sweep()
