"""One contract for every ledger: what a run leaves there is what the next run finds."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from async_recovery import FileLedger, InputChanged, ItemFailed, Ledger, SqliteLedger, StorageFailed, run_resumable
from async_recovery.checkpoint import Commit, Job
from async_recovery.errors import AsyncRecoveryError
from async_recovery.files import Files
from async_recovery.testing import LedgerContract

from .support.memory_ledger import MemoryLedger, Store
from .support.virtual_loop import at_round, run_virtual


class TestMemoryLedger(LedgerContract):
    """The ledger that the engine's own tests run over."""

    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.store = Store()

    def make(self, **options: Any) -> Ledger:
        return MemoryLedger(self.store, **options)

    async def published(self) -> list[bytes] | None:
        return self.store.published


class TestFileLedger(LedgerContract):
    """The default."""

    can_change = can_fail = True

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.path = tmp_path / "out.jsonl"
        self.files = FailingFiles()

    def make(self, **options: Any) -> Ledger:
        return FileLedger(self.path, files=self.files, **options)

    def change(self) -> None:
        partial = Path(f"{self.path}.partial")
        partial.write_bytes(b"!" + partial.read_bytes()[1:])

    @contextmanager
    def failing(self) -> Iterator[None]:
        self.files.fail = True
        yield
        self.files.fail = False

    async def published(self) -> list[bytes] | None:
        return self.path.read_bytes().splitlines() if self.path.exists() else None


class TestSqliteLedger(LedgerContract):
    """A table of a database."""

    can_change = can_fail = True

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.path = tmp_path / "out.db"

    def make(self, **options: Any) -> Ledger:
        return SqliteLedger(self.path, **options)

    def change(self) -> None:
        execute(self.path, """UPDATE async_recovery_record SET record = '{"index":0}' WHERE "index" = 0""")

    @contextmanager
    def failing(self) -> Iterator[None]:
        execute(self.path, "ALTER TABLE async_recovery_record RENAME TO gone")
        yield
        execute(self.path, "ALTER TABLE gone RENAME TO async_recovery_record")

    async def published(self) -> list[bytes] | None:
        return records_in(self.path) if self.path.exists() else None


class ChecksNothing(SqliteLedger):
    async def _refuse_change(self, *_: Any) -> None:
        pass


class Forgets(SqliteLedger):
    async def commit(self, commit: Commit) -> None:
        try:
            await super().commit(commit)
        finally:
            self._poison = None


class Swallows(SqliteLedger):
    async def commit(self, commit: Commit) -> None:
        with suppress(StorageFailed):
            await super().commit(commit)


@pytest.mark.parametrize(
    ("careless", "test"),
    [
        (ChecksNothing, "test_what_was_changed_is_found_by_the_next_run"),
        (ChecksNothing, "test_what_was_changed_is_not_published"),
        (Forgets, "test_after_a_failed_commit_nothing_is_written"),
        (Swallows, "test_after_a_failed_commit_nothing_is_written"),
    ],
)
def test_a_ledger_that_believes_its_storage_fails_the_suite(
    tmp_path: Path, careless: type[SqliteLedger], test: str
) -> None:
    """What is changed or fails behind its back is noticed, by the test that is there for it."""

    class Suite(TestSqliteLedger):
        path = tmp_path / "out.db"

        def make(self, **options: Any) -> Ledger:
            return careless(self.path, **options)

    with pytest.raises(AssertionError, match="was expected, and nothing was raised"):
        getattr(Suite(), test)()


def execute(database: Path, statement: str) -> None:
    """Do that behind a ledger's back."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement)


class FailingFiles(Files):
    """A disk that writes nothing while it is told to fail."""

    fail = False

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.fail:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().pwrite(descriptor, data, offset)


async def _echo(item: int) -> int:
    await asyncio.sleep(0.2)
    return item


# What anyio leaves of a task that is cancelled before its first turn.
@pytest.mark.filterwarnings(r"ignore:coroutine 'Run\._(audit|work)' was never awaited")
@pytest.mark.parametrize(
    ("suffix", "torn_down"),
    [("jsonl", False), ("jsonl", True), ("db", False), pytest.param("db", True, marks=pytest.mark.slow)],
)
def test_a_cancellation_at_any_round_loses_nothing(tmp_path: Path, suffix: str, *, torn_down: bool) -> None:
    """Cancelled, or torn down with its loop, at any round of the loop, the next run gives the same bytes."""
    expected = b"".join(b'{"index":%d,"result":%d}\n' % (index, index) for index in range(6))
    step, cancelled = 1, 0
    while True:
        output = tmp_path / f"{step}.{suffix}"
        ran: list[int] = []

        async def worker(item: int, ran: list[int] = ran) -> int:
            ran.append(item)
            return await _echo(item)

        def job(output: Path = output, worker: Any = worker) -> Any:
            where = output if suffix == "jsonl" else f"sqlite:///{output}"
            return run_resumable(
                worker, range(6), output=where, concurrency=2, checkpoint_interval=0.1, drain_timeout=0
            )

        async def main(job: Any = job, step: int = step) -> None:
            task = asyncio.ensure_future(job())
            reached = asyncio.get_running_loop().create_future()
            at_round(step, reached.cancel)
            await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
            if reached.done() and not torn_down:
                task.cancel()
                await task
            elif reached.done():  # the loop's runner cancels every task
                raise asyncio.CancelledError

        try:
            run_virtual(main())
        except asyncio.CancelledError:
            cancelled += 1
            finished_before = asyncio.run(_committed(output))
            del ran[:]
            if not published_in(output):
                run_virtual(job())
            assert not finished_before & set(ran)
        else:
            break
        assert published_in(output) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{n}.{suffix}" for n in range(1, step + 1))
        step += 1
    assert cancelled > 20


def published_in(output: Path) -> bytes:
    """The records of the complete run in a file or a database; nothing if there is none."""
    if not output.exists() or output.suffix == ".jsonl":
        return output.read_bytes() if output.exists() else b""
    return b"".join(record + b"\n" for record in records_in(output))


def records_in(database: Path) -> list[bytes]:
    """The records that the view of a database shows."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute('SELECT record FROM async_recovery_results ORDER BY "index"')
        return [record.encode() for (record,) in rows]


async def _committed(output: Path) -> set[int]:
    if published_in(output):
        return set()
    ledger = FileLedger(output) if output.suffix == ".jsonl" else SqliteLedger(output)
    worker = f"{__name__}:test_a_cancellation_at_any_round_loses_nothing.<locals>.worker"
    job = Job("iterable", worker, None, ledger.form)
    try:
        found = await ledger.open(job)
    except (AsyncRecoveryError, InputChanged):
        raise AssertionError("a cancelled run left something that can not be resumed") from None
    finally:
        await ledger.close()
    return set(found.ahead) | set(range(found.state.mark if found.state else 0))


async def test_a_job_of_which_nothing_is_done_leaves_nothing(tmp_path: Path) -> None:
    """A worker that fails on its first item costs nothing: mended, under any name, it starts anew."""
    output = tmp_path / "new" / "folder" / "out.jsonl"

    async def wrong(item: int) -> int:
        raise NameError("typo")

    with pytest.raises(ItemFailed, match="typo"):
        await run_resumable(wrong, range(5), output=output, concurrency=2)
    assert list(tmp_path.iterdir()) == []
    summary = await run_resumable(_echo, range(5), output=output)
    assert summary.executed == 5


async def test_what_was_done_stays_when_the_next_item_fails(tmp_path: Path) -> None:
    """One committed item is enough to keep the checkpoint, and the next run does not repeat it."""
    output = tmp_path / "out.jsonl"
    ran = []

    async def worker(item: int) -> int:
        ran.append(item)
        if item == 1 and ran.count(1) == 1:
            raise ConnectionError
        return item

    with pytest.raises(ItemFailed):
        await run_resumable(worker, range(3), output=output, concurrency=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.checkpoint", "out.jsonl.partial"]
    await run_resumable(worker, range(3), output=output, concurrency=1)
    assert ran == [0, 1, 1, 2]
