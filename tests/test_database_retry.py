"""The failed items of a run in a SQLite database, run again: the table is then that of a run that never failed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from async_recovery import (
    AlreadyRunning,
    InputChanged,
    ItemFailed,
    JobMismatch,
    Mismatch,
    OutputChanged,
    UsageError,
    database,
    retry_failed,
    run_resumable,
)
from async_recovery.checkpoint import Job
from async_recovery.contracts import Source
from async_recovery.database_verify import verify_database
from async_recovery.export import export
from async_recovery.progress import NOT_BEGUN
from async_recovery.sqlite_retry import DatabaseFailures, SqliteRetryLedger
from async_recovery.status import read_status
from async_recovery.testing import SourceContract

ITEMS = 60


class Worker:
    """Doubles numbers, says which it ran, and fails where it is told to."""

    def __init__(self, *fails: int) -> None:
        self.ran: list[int] = []
        self._fails = fails

    async def __call__(self, item: int) -> dict[str, Any]:
        self.ran.append(item)
        if item in self._fails:
            raise RuntimeError("é" * item)
        return {"doubled": item * 2}


class Broken(Worker):
    """The same worker as far as its name goes; what it raises can not be recorded."""

    async def __call__(self, item: int) -> dict[str, Any]:
        if item in self._fails:
            raise KeyboardInterrupt
        return await super().__call__(item)


Broken.__qualname__ = Worker.__qualname__
FAILED = [0, 7, 8, 31, ITEMS - 1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def address(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(database, "SLICE_BYTES", 200)  # so that there are many slices
    return f"sqlite:///{path}"


async def fail(address: str, **options: Any) -> None:
    """A complete run with failures."""
    await run_resumable(Worker(*FAILED), range(ITEMS), output=address, on_error="record", **options)


def query(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


async def exported(address: str, path: Path) -> bytes:
    await export(address, str(path))
    return path.read_bytes()


@pytest.mark.parametrize("keep", [False, True])
async def test_only_the_failed_items_run_and_the_run_is_whole_afterwards(
    address: str, path: Path, tmp_path: Path, *, keep: bool
) -> None:
    """Records, checksum and summary are those of a run in which they did not fail; nothing else is left."""
    await run_resumable(Worker(8), range(ITEMS), output=tmp_path / "expected.jsonl", on_error="record")
    await fail(address, keep_checkpoint=keep)
    worker = Worker(8)
    summary = await retry_failed(worker, address)
    assert (worker.ran, summary.total_items, summary.failed) == (FAILED, len(FAILED), 1)
    assert await exported(address, tmp_path / "out.jsonl") == (tmp_path / "expected.jsonl").read_bytes()
    assert (await verify_database(address)).problems == []
    assert query(path, "SELECT name, complete, kept FROM async_recovery_run") == [("default", 1, int(keep))]
    assert query(path, "SELECT count(*) FROM async_recovery_record") == [(ITEMS,)]
    assert (await retry_failed(Worker(), address)).failed == 0
    nothing = Worker()
    await retry_failed(nothing, address)
    assert nothing.ran == []


async def test_the_failed_items_of_a_run_with_the_longest_name_run_again(address: str) -> None:
    """What names the retry is not counted."""
    address = f"{address}?run={'n' * 200}"
    await fail(address)
    assert (await retry_failed(Worker(), address)).failed == 0


async def test_a_retry_that_is_interrupted_goes_on(address: str, path: Path, tmp_path: Path) -> None:
    """What was run again is not run once more; until all of it is, the complete run is as it was."""
    await fail(address)
    before = await exported(address, tmp_path / "before.jsonl")
    with pytest.raises(ItemFailed):
        await retry_failed(Broken(31), address, concurrency=1, batch_size=1)
    assert await exported(address, tmp_path / "after.jsonl") == before
    assert [subject for subject, _ in (await verify_database(address)).problems] == ["retry"]
    with pytest.raises(JobMismatch):
        await retry_failed(Worker(), address, version="2")
    with pytest.raises(Mismatch, match=r"failed items of .* are being run again"):
        await fail(address)
    worker = Worker()
    await retry_failed(worker, address)
    assert worker.ran == FAILED[3:]
    assert b"error" not in await exported(address, tmp_path / "after.jsonl")
    assert (await verify_database(address)).problems == []


async def test_a_retry_that_is_going_on_is_seen(address: str) -> None:
    """The run is held meanwhile: the same line would have to wait, and is not refused for good."""
    await fail(address)
    ledger = SqliteRetryLedger(address)
    await ledger.open(Job("failures", "tests:worker", None, "table"))
    await ledger.show(NOT_BEGUN)
    status = await anyio.to_thread.run_sync(read_status, address)
    report = await verify_database(address)
    with pytest.raises(AlreadyRunning):
        await fail(address)
    await ledger.close()
    assert (status.state, report.state) == ("running", "running")
    assert status.running is not None
    assert status.running["progress"]["finished"] == 0, "what the retry says of itself, not of the run"
    assert "exit code 75" in report.next
    status = await anyio.to_thread.run_sync(read_status, address)
    assert (status.state, status.running, status.mark, status.commits) == ("complete", None, ITEMS, None)


async def test_a_fresh_run_drops_a_retry(address: str, path: Path) -> None:
    """A job that starts anew takes the unfinished retry of its last run with it."""
    await fail(address)
    with pytest.raises(ItemFailed):
        await retry_failed(Broken(31), address, concurrency=1, batch_size=1)
    await fail(address, fresh=True)
    assert query(path, "SELECT name, complete FROM async_recovery_run") == [("default", 1)]


async def test_a_run_that_changes_under_a_retry_is_refused(address: str, path: Path) -> None:
    """Records that are not what they were when the retry began: nothing is put in their places."""
    await fail(address)
    with pytest.raises(ItemFailed):
        await retry_failed(Broken(31), address, concurrency=1, batch_size=1)
    query(path, """UPDATE async_recovery_record SET record = replace(record, '44', '45') WHERE "index" = 22""")
    with pytest.raises((InputChanged, OutputChanged), match="--fresh"):
        await retry_failed(Worker(), address)
    with pytest.raises((InputChanged, OutputChanged), match="not those that were written"):
        await retry_failed(Worker(), address, fresh=True)


async def test_what_has_no_failed_items_to_be_run_again_is_told(address: str, path: Path) -> None:
    """No database, no such run, and one that is not complete."""
    with pytest.raises(UsageError, match=f"there is no database {path}"):
        await retry_failed(Worker(), address)
    assert not path.exists()
    with pytest.raises(ItemFailed):
        await run_resumable(Worker(5), range(9), output=address, concurrency=1, batch_size=1)
    with pytest.raises(Mismatch, match="is not finished"):
        await retry_failed(Worker(), address)
    with pytest.raises(UsageError, match="checkpoint with"):
        await retry_failed(Worker(), address, checkpoint="c")


class TestDatabaseFailures(SourceContract):
    """The failures of a complete run are a source like any other."""

    can_change = True

    @pytest.fixture(autouse=True)
    async def _place(self, address: str, path: Path) -> None:
        await fail(address)
        self.address, self.path = address, path

    def make(self) -> Source:
        return DatabaseFailures(self.address)

    def change(self) -> None:
        query(self.path, """UPDATE async_recovery_record SET record = replace(record, 'é', 'è') WHERE "index" = 7""")
