"""A run in a SQLite database: what the table shows, what a resume finds, and what is refused."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from async_recovery import (
    AlreadyRunning,
    CheckpointUnusable,
    IncompleteRun,
    ItemFailed,
    JobMismatch,
    OutputChanged,
    SqliteLedger,
    StorageFailed,
    UsageError,
    run_resumable,
    sqlite,
)
from async_recovery.checkpoint import Ahead, Bookmark, Commit, Job
from async_recovery.database import Snapshot
from async_recovery.database_verify import verify_database
from async_recovery.export import export
from async_recovery.ledgers import is_address, ledger_of, look_at, split_address, sqlite_path

from .support.file_jobs import names_in, snapshot

JOB = Job("iterable", "tests:worker", None, "table")


class Worker:
    """Doubles numbers, says which it ran, and fails where it is told to."""

    def __init__(self, *fails: int, factor: int = 2) -> None:
        self.ran: list[int] = []
        self._fails = fails
        self._factor = factor

    async def __call__(self, item: int) -> Any:
        self.ran.append(item)
        if item in self._fails:
            raise RuntimeError("as the test says é")
        return {"doubled": item * self._factor, "text": "é\n\0"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def address(path: Path) -> str:
    return f"sqlite:///{path}"


def query(path: Path, statement: str, *values: Any) -> list[Any]:
    """What a reader sees, or does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def results(path: Path, run: str = "default") -> list[dict[str, Any]]:
    """The records that the view shows of a run."""
    rows = query(path, 'SELECT "index", record FROM async_recovery_results WHERE run = ? ORDER BY "index"', run)
    found = [msgspec.json.decode(record) for _, record in rows]
    assert [index for index, _ in rows] == [record["index"] for record in found] == list(range(len(found)))
    return found


def commit(generation: int, mark: int, records: list[int], ahead: list[int]) -> Commit:
    """A commit of records of these indices."""
    return Commit(
        generation=generation,
        mark=mark,
        window=10,
        bookmark=Bookmark(None, 0, 0),
        records=[b'{"index":%d}' % index for index in records],
        ahead=[Ahead(index, index * 11, b'{"index":%d}' % index) for index in ahead],
        failed=0,
    )


async def interrupt(address: str, items: int = 20, at: int = 13) -> Worker:
    """A job of that many items that has failed at one of them."""
    worker = Worker(at)
    with pytest.raises(ItemFailed):
        await run_resumable(worker, range(items), output=address, concurrency=1, batch_size=2)
    return worker


async def resume(address: str, items: int = 20, **options: Any) -> Worker:
    """The same call, and nothing fails any more."""
    worker = Worker()
    await run_resumable(worker, range(items), output=address, **options)
    return worker


async def test_the_view_shows_complete_runs_only(address: str, path: Path) -> None:
    """Nothing of a run is seen before it is complete, and then all of it, in order."""
    await interrupt(address)
    assert results(path) == []
    worker = await resume(address)
    assert min(worker.ran) == 13
    assert [record["doubled"] for record in results(path)] == [2 * n for n in range(20)]
    assert names_in(path.parent) == {"results.db"}


async def test_the_old_result_stays_until_the_new_one_is_complete(address: str, path: Path) -> None:
    """The same call after completion starts anew; until that is complete, what was there is seen, and then is gone."""
    await resume(address)
    other = Worker(13, factor=3)
    with pytest.raises(ItemFailed):
        await run_resumable(other, range(20), output=address, concurrency=1, batch_size=2)
    assert other.ran[0] == 0
    assert [record["doubled"] for record in results(path)] == [2 * n for n in range(20)]
    await run_resumable(Worker(factor=3), range(20), output=address)
    assert [record["doubled"] for record in results(path)] == [3 * n for n in range(20)]
    assert query(path, "SELECT count(*) FROM async_recovery_record") == [(20,)]


async def test_several_runs_share_a_database_with_the_tables_of_others(address: str, path: Path) -> None:
    """Each run has its own records under its own name, and a table that was there is left alone."""
    query(path, "CREATE TABLE mine (a)")
    query(path, "INSERT INTO mine VALUES (7)")
    await resume(address, 5)
    await resume(f"{address}?run=the%20other", 7)
    assert (len(results(path)), len(results(path, "the other"))) == (5, 7)
    assert query(path, "SELECT a FROM mine") == [(7,)]


async def test_one_run_at_a_time_in_a_database(path: Path) -> None:
    """Also a run of another name is refused while one is open."""
    first, second = SqliteLedger(path), SqliteLedger(path, "other")
    await first.open(JOB)
    with pytest.raises(AlreadyRunning, match=r"results\.db\.lock is held by process"):
        await second.open(JOB)
    await second.close()
    await first.close()
    assert names_in(path.parent) == set()


async def test_fresh_starts_anew_and_another_job_is_refused(address: str, path: Path) -> None:
    """What another job has left is refused without a change, unless the new one is to begin anew."""
    await interrupt(address)
    before = snapshot(path.parent)
    with pytest.raises(JobMismatch, match="version None, not '2'"):
        await resume(address, version="2")
    assert snapshot(path.parent) == before
    worker = await resume(address, version="2", fresh=True)
    assert len(worker.ran) == len(results(path)) == 20


async def test_a_job_of_which_nothing_is_done_leaves_nothing(address: str, path: Path) -> None:
    """A worker that fails at once leaves neither a database nor, in one that was there, a row."""
    for others in ([], ["other"]):
        for run in others:
            await resume(f"{address}?run={run}", 3)
        with pytest.raises(ItemFailed):
            await run_resumable(Worker(0), range(5), output=address, concurrency=1)
        assert names_in(path.parent) == ({"results.db"} if others else set())
    assert query(path, "SELECT name FROM async_recovery_run") == [("other",)]


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE async_recovery_record SET record = replace(record, '4', '5') WHERE "index" = 2""",
        """DELETE FROM async_recovery_record WHERE "index" = 2""",
        """INSERT INTO async_recovery_record VALUES (1, 19, '{"index":19}')""",
        """UPDATE async_recovery_record SET "index" = 19 WHERE "index" = 12""",
    ],
)
async def test_changed_records_are_found(address: str, path: Path, change: str) -> None:
    """A record that was changed, removed or added is found: before a resume publishes, and by verify."""
    await interrupt(address)
    assert (await verify_database(address)).problems == []
    query(path, change)
    assert [subject for subject, _ in (await verify_database(address)).problems] == ["output"]
    with pytest.raises(OutputChanged, match=r"--fresh"):
        await resume(address)
    assert results(path) == []


@pytest.mark.parametrize("change", ["SET record = 'x'", "SET item_crc = 1", 'SET "index" = 17'])
async def test_a_damaged_row_ahead_costs_its_item_alone(path: Path, change: str) -> None:
    """What is ahead has a checksum of its own: an item whose row is damaged is done again, no other."""
    ledger = SqliteLedger(path)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 0, [], [2, 3]))
    await ledger.close()
    query(path, f'UPDATE async_recovery_ahead {change} WHERE "index" = 3')
    ledger = SqliteLedger(path)
    found = await ledger.open(JOB)
    await ledger.close()
    assert found.ahead == {2: Ahead(2, 22, b'{"index":2}')}


async def test_a_damaged_checkpoint_is_put_aside_or_refused(address: str, path: Path) -> None:
    """A line that can not be read: refused if that is asked for, else its records stay under another name."""
    await interrupt(address)
    query(path, "UPDATE async_recovery_run SET checkpoint = replace(checkpoint, 'mark', 'Mark')")
    with pytest.raises(CheckpointUnusable, match="can not be read"):
        await resume(address, on_damage="refuse")
    worker = await resume(address)
    assert len(worker.ran) == len(results(path)) == 20
    assert query(path, "SELECT name, complete FROM async_recovery_run ORDER BY name") == [
        ("default", 1),
        ("default.damaged-1", 0),
    ]
    damaged = "SELECT count(*) FROM async_recovery_record JOIN async_recovery_run ON id = run WHERE NOT complete"
    assert query(path, damaged) == [(13,)]


async def test_a_kept_run_is_compared_and_not_done_again(address: str, path: Path) -> None:
    """With keep_checkpoint the same call runs nothing, if its records are still those that were written."""
    await resume(address, keep_checkpoint=True)
    assert (await resume(address, keep_checkpoint=True)).ran == []
    query(path, "UPDATE async_recovery_record SET record = replace(record, '4', '5')")
    with pytest.raises(OutputChanged):
        await resume(address, keep_checkpoint=True)


async def test_a_failed_commit_is_the_last_thing_that_is_tried(path: Path) -> None:
    """An error of the storage names the database and the durable mark; nothing follows, and the mark is resumed."""
    ledger = SqliteLedger(path)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 1, [0], []))
    await ledger._thread.run(lambda: ledger._connection.execute("PRAGMA max_page_count = 1"))
    large = msgspec.structs.replace(commit(3, 2, [], []), records=[b'{"index":1,"x":"%b"}' % (b"x" * 100_000)])
    for refused in (large, commit(3, 2, [1], [])):
        with pytest.raises(StorageFailed, match=r"results\.db: .*disk is full.* up to the mark 1 and ahead of it"):
            await ledger.commit(refused)
    log = Path(f"{path}-wal").read_bytes()
    await ledger.close()
    assert Path(f"{path}-wal").read_bytes() == log, "closing has touched what may not be what it seems"
    again = SqliteLedger(path)
    found = await again.open(JOB)
    await again.close()
    assert found.state is not None
    assert found.state.mark == 1


async def test_a_commit_is_durable_by_the_settings_that_were_read_back(path: Path) -> None:
    """The connection that commits has a write-ahead log, and syncs it at each commit."""
    ledger = SqliteLedger(path)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))

    def setting(name: str) -> Any:
        return ledger._connection.execute(f"PRAGMA {name}").fetchone()[0]

    expected = {"journal_mode": "wal", "synchronous": 2, "wal_autocheckpoint": 0}
    assert {name: await ledger._thread.run(setting, name) for name in expected} == expected
    await ledger.close()


async def test_the_log_stays_small(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is committed, and then removed, the write-ahead log is copied and begins anew."""
    monkeypatch.setattr(sqlite, "LARGE_LOG_BYTES", 100_000)
    monkeypatch.setattr(sqlite, "SWEEP_ROWS", 20)
    for fresh in (False, True):
        ledger = SqliteLedger(path, fresh=fresh)
        await ledger.open(JOB)
        await ledger.commit(commit(1, 0, [], []))
        for number in range(200):
            record = b'{"index":%d,"x":"%b"}' % (number, b"x" * 10_000)
            large = msgspec.structs.replace(commit(number + 2, number + 1, [], []), records=[record])
            await ledger.commit(large)
            assert Path(f"{path}-wal").stat().st_size < 400_000
        await ledger.close()


async def test_spent_attempts_are_remembered_until_the_item_is_finished(address: str, path: Path) -> None:
    """Failed attempts of an item that is not finished survive the process, and go with its outcome."""
    with pytest.raises(ItemFailed):
        await run_resumable(Worker(3, 4), range(9), output=address, concurrency=1, retry=1)
    failing = Worker(5)
    with pytest.raises(ItemFailed):
        await run_resumable(failing, range(9), output=address, concurrency=1, retry=1)
    assert failing.ran[0] == 3
    await resume(address, 9, retry=2)
    assert query(path, "SELECT * FROM async_recovery_spent") == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
async def test_an_export_is_the_file_that_a_run_would_have_written(address: str, tmp_path: Path, name: str) -> None:
    """Byte for byte, recorded failures and all; of no items, too."""
    for items in (0, 1, 2_000):
        for output in (address, tmp_path / f"file-{name}"):
            await run_resumable(Worker(1, 5), range(items), output=output, on_error="record")
        assert await export(address, str(tmp_path / name)) == items
        assert (tmp_path / name).read_bytes() == (tmp_path / f"file-{name}").read_bytes()
    assert names_in(tmp_path) == {"results.db", name, f"file-{name}"}


async def test_an_export_of_what_is_not_whole_leaves_the_old_file(address: str, path: Path, tmp_path: Path) -> None:
    """A run that was never complete, or whose records were changed, is not written: what is there stays."""
    target = tmp_path / "out.json"
    target.write_text("old")
    await interrupt(address)
    with pytest.raises(IncompleteRun, match="its mark is 13"):
        await export(address, str(target))
    await resume(address)
    query(path, "UPDATE async_recovery_record SET record = replace(record, '4', '5')")
    with pytest.raises(OutputChanged):
        await export(address, str(target))
    assert target.read_text() == "old"
    assert names_in(tmp_path) == {"results.db", "out.json"}


async def test_an_export_never_replaces_the_database(address: str, path: Path) -> None:
    """Not by the name of the database, nor by a link to it or by that of a file beside it."""
    await resume(address)
    (path.parent / "link.json").symlink_to(path)
    before = snapshot(path.parent)
    for name in ("results.db", "link.json", "results.db-wal"):
        with pytest.raises(UsageError, match="belongs to the database itself"):
            await export(address, str(path.parent / name))
    assert snapshot(path.parent) == before


async def test_looking_touches_nothing(address: str, path: Path) -> None:
    """`verify` and `export` of an idle database make no file beside it, and leave it as it is."""
    await resume(address)
    before = snapshot(path.parent)
    assert (await verify_database(address)).problems == []
    assert snapshot(path.parent) == before


async def test_a_look_is_taken_again_if_somebody_wrote_meanwhile(address: str, path: Path) -> None:
    """What was read of a database that seemed idle, and was not, does not count."""
    await resume(address)
    os.utime(path, (0, 0))  # long ago, as far as its time can tell
    seen: list[bool] = []

    async def look(found: Snapshot) -> bool:
        if not seen:
            await asyncio.to_thread(query, path, "UPDATE async_recovery_run SET kept = 1")
        seen.append(found.left.kept)
        return found.left.kept

    assert await look_at(address, look) is True
    assert seen == [False, True]


async def test_looking_while_a_run_goes_on(path: Path, address: str) -> None:
    """A reader sees the last commit of the run that has the database open, and that it is running."""
    ledger = SqliteLedger(path)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 1, [0], [3]))
    report = await verify_database(address)
    assert (report.state, report.records, report.problems) == ("running", 1, [])
    await ledger.commit(commit(3, 2, [1], []))
    assert (await verify_database(address)).records == 2
    await ledger.close()


def _schema(path: Path) -> None:
    query(path, "CREATE TABLE async_recovery_schema (version)")
    query(path, "INSERT INTO async_recovery_schema VALUES (99)")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (_schema, CheckpointUnusable, "have the version 99, this one reads 1"),
        (lambda path: path.write_text("no database\n" * 99), UsageError, "is no SQLite database"),
        (Path.mkdir, UsageError, "is not a regular file"),
        (lambda path: path.symlink_to(path.parent / "no" / "such.db"), UsageError, "there is no folder .*no"),
        (lambda path: (path.touch(), (path.parent / "b").hardlink_to(path)), UsageError, "several names"),
    ],
)
async def test_what_can_not_be_used_is_told_and_left_alone(
    address: str, path: Path, make: Any, error: type[Exception], message: str
) -> None:
    """A schema of another version, a file that is no database, a folder, none: an error, and nothing has changed."""
    make(path)
    before = snapshot(path.parent)
    with pytest.raises(error, match=message):
        await resume(address)
    with pytest.raises(error, match=message):
        await export(address, str(path.parent / "out.json"))
    assert snapshot(path.parent) == before


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ("*** in database main ***\nOn tree page 5 cell 10: failed to get page 232", sqlite3.OperationalError),
        ("Tree 5 page 232: unable to get the page. error code=266", sqlite3.OperationalError),
        ("Tree 5 page 232: unable to get the page. error code=10", sqlite3.OperationalError),
        ("Tree 5 page 232: unable to get the page. error code=11", CheckpointUnusable),
        ("Tree 5 page 232: btreeInitPage() returns error code 11", CheckpointUnusable),
    ],
)
def test_a_disk_that_fails_in_the_check_is_no_damage(found: str, error: type[Exception]) -> None:
    """What SQLite says of a page that the disk did not give: the storage failed, and nobody knows what is there."""
    connection = mock.Mock()
    connection.execute.return_value.fetchone.return_value = (found,)
    with pytest.raises(error):
        sqlite.check_whole(connection, "out.db")


async def test_a_database_with_a_damaged_page_is_refused(address: str, path: Path) -> None:
    """What SQLite itself finds wrong is told before anything is read from it."""
    await interrupt(address, items=3_000, at=2_999)
    data = bytearray(path.read_bytes())
    data[2 * 4096 : -4096] = b"\xff" * (len(data) - 3 * 4096)
    path.write_bytes(data)
    with pytest.raises(CheckpointUnusable, match=r"is damaged \("):
        await resume(address, items=3_000)
    assert path.read_bytes() == bytes(data)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///a.db", ("a.db", "default")),
        ("sqlite:////tmp/a.db?run=x", ("/tmp/a.db", "x")),
        ("sqlite:///a%3Fb%25.db?run=x%20y", ("a?b%.db", "x y")),
        ("SQLite:///a.db", ("a.db", "default")),
    ],
)
def test_an_address_names_a_file_and_a_run(given: str, expected: tuple[str, str]) -> None:
    """Three slashes are a path from here, four one from the root; the run has a name of its own, or the usual one."""
    assert is_address(given)
    assert sqlite_path(given) == expected
    ledger = ledger_of(given)
    assert sqlite_path(str(ledger.output)) == expected


@pytest.mark.parametrize(
    "address",
    [
        *("sqlite:a.db", "sqlite:/a.db", "sqlite://a.db", "sqlite:///", "sqlite:///a.db#x", "sqlite:///a.db?ran=x"),
        *("sqlite:///a.db?run=", "sqlite:///a.db?run=a&run=b", "sqlite:///a.db?run=%00", "mysql://a/b", "S3://a/b"),
        "sqlite:///:memory:",
        *("postgresql+asyncpg://a/b", "sqlite://[::1/a.db"),
    ],
)
def test_a_wrong_address_is_told(address: str) -> None:
    """An address that is none, or of a database that is not known, is no file's name."""
    with pytest.raises(UsageError, match=r"sqlite:///FILE|names two runs|Invalid IPv6|give the run a name"):
        ledger_of(address)


def test_the_address_of_the_database_is_what_remains() -> None:
    """The name of the run goes, everything else stays as it was."""
    assert split_address("postgresql://u@h/d?a=b%20c&run=r&x=y") == ("postgresql://u@h/d?a=b%20c&x=y", "r")


async def test_what_a_database_does_not_take_is_refused(address: str, path: Path) -> None:
    """No checkpoint beside a database; and a `Ledger` that is given has its own options."""
    with pytest.raises(UsageError, match="checkpoint with the output"):
        await resume(address, checkpoint="x")
    for option in ({"fresh": True}, {"keep_checkpoint": True}, {"on_damage": "refuse"}):
        with pytest.raises(UsageError, match="belong to the Ledger"):
            await run_resumable(Worker(), range(3), output=SqliteLedger(path), **option)
    assert names_in(path.parent) == set()
    await run_resumable(Worker(), range(3), output=SqliteLedger(path, "mine"))
    assert len(results(path, "mine")) == 3
