"""A run in a PostgreSQL database: the contract, what the table shows, who may write, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_recovery import (
    AlreadyRunning,
    AsyncRecoveryError,
    CheckpointUnusable,
    ItemFailed,
    JobMismatch,
    Ledger,
    Mismatch,
    OutputChanged,
    PostgresLedger,
    StorageFailed,
    UsageError,
    database,
    postgres,
    retry_failed,
    run_resumable,
)
from async_recovery.checkpoint import Ahead, Job
from async_recovery.contracts import Source
from async_recovery.database_verify import verify_database
from async_recovery.engine import Run
from async_recovery.export import export
from async_recovery.ledgers import ledger_of, public, retry_ends, shown_word, split_address
from async_recovery.options import Options
from async_recovery.postgres_session import delays
from async_recovery.progress import NOT_BEGUN
from async_recovery.sources import as_source
from async_recovery.sqlite_retry import DatabaseFailures
from async_recovery.status import read_status
from async_recovery.testing import LedgerContract, SourceContract
from async_recovery.torture import torture

from .support.commands import Ended, Folder, check_one_line
from .support.file_jobs import names_in
from .support.fork_server import ForkServer, Reply
from .support.jobs import LOG
from .support.postgres import Server
from .test_sqlite import JOB, Worker, commit, interrupt, resume

RESULTS = 'SELECT record::text FROM async_recovery_results WHERE run = $1 ORDER BY "index"'


class Place:
    """An empty database."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = server.new_database()
        self.address = server.address(self.name)

    def sql(self, statement: str, *values: Any) -> list[Any]:
        """What a reader sees, or does."""
        return self.server.sql(statement, *values, database=self.name)

    def records(self, run: str = "default") -> list[bytes]:
        """What the view shows of a run."""
        if self.sql("SELECT to_regclass('async_recovery_results') IS NULL")[0][0]:
            return []
        return [record.encode() for (record,) in self.sql(RESULTS, run)]

    def doubled(self, run: str = "default") -> list[int]:
        """The same, the field of that name."""
        return [msgspec.json.decode(record)["doubled"] for record in self.records(run)]

    def cut_off(self) -> None:
        """End all sessions of ledgers, as a server that is being restarted does."""
        mine = "application_name LIKE 'async-recovery%' AND datname = current_database()"
        self.sql(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {mine}")

    def everything(self) -> list[Any]:
        """All rows, for whoever compares."""
        tables = ("schema", "fence", "run", "record", "ahead", "spent")
        if self.sql("SELECT to_regclass('async_recovery_run') IS NULL")[0][0]:
            return self.sql("SELECT relname::text FROM pg_class WHERE relname LIKE 'async%'")
        return [self.sql(f"SELECT t::text FROM async_recovery_{table} AS t ORDER BY 1") for table in tables]


@pytest.fixture
def place(server: Server) -> Place:
    return Place(server)


@pytest.fixture
def address(place: Place) -> str:
    return place.address


class TestPostgresLedger(LedgerContract):
    """A table of a database on a server."""

    can_change = can_fail = True

    @pytest.fixture(autouse=True)
    def _place(self, place: Place) -> None:
        self.place = place

    def make(self, **options: Any) -> Ledger:
        return PostgresLedger(self.place.address, sleep=never, **options)

    def change(self) -> None:
        self.place.sql("""UPDATE async_recovery_record SET record = '{"index":0}' WHERE "index" = 0""")

    @contextmanager
    def failing(self) -> Iterator[None]:
        self.place.sql("ALTER TABLE async_recovery_record RENAME TO gone")
        yield
        self.place.sql("ALTER TABLE gone RENAME TO async_recovery_record")

    async def published(self) -> list[bytes] | None:
        return self.place.records()


async def never(delay_s: float) -> None:
    """Waits for nothing."""
    await asyncio.sleep(0)


async def begun(place: Place, **options: Any) -> PostgresLedger:
    """A ledger with a record, and one ahead of the mark."""
    ledger = PostgresLedger(place.address, **options)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    await ledger.commit(commit(2, 1, [0], [3]))
    return ledger


async def mark_of(address: str) -> tuple[int, dict[int, Ahead]]:
    """What another run finds."""
    ledger = PostgresLedger(address)
    try:
        found = await ledger.open(JOB)
    finally:
        await ledger.close()
    return found.state.mark if found.state else -1, found.ahead


async def test_the_view_shows_complete_runs_only(place: Place, address: str) -> None:
    """Nothing of a run is seen before it is complete; the old result stays until the new one is."""
    await interrupt(address)
    assert place.doubled() == []
    worker = await resume(address)
    assert min(worker.ran) == 13
    assert place.doubled() == [2 * n for n in range(20)]
    with pytest.raises(ItemFailed):
        await run_resumable(Worker(13, factor=3), range(20), output=address, concurrency=1, batch_size=2)
    assert place.doubled() == [2 * n for n in range(20)]
    await run_resumable(Worker(factor=3), range(20), output=address)
    assert place.doubled() == [3 * n for n in range(20)]
    assert place.sql("SELECT count(*) FROM async_recovery_record") == [(20,)]


async def test_runs_of_one_database_go_on_at_the_same_time(place: Place, address: str) -> None:
    """Each has its own records under its own name, also when none of the tables is there at the beginning."""
    place.sql("CREATE TABLE mine (a int)")
    names = [f"run {number}" for number in range(4)]
    await asyncio.gather(*(resume(f"{address}&run={name.replace(' ', '%20')}", 30) for name in names))
    assert [place.doubled(name) for name in names] == [[2 * n for n in range(30)]] * 4
    assert place.sql("SELECT count(*) FROM mine") == [(0,)]


async def test_the_exact_bytes_of_a_record_are_kept(place: Place, address: str, tmp_path: Path) -> None:
    """Order of keys, long numbers and control characters: an export is the file that a run would have written."""

    async def worker(item: int) -> dict[str, Any]:
        if item == 3:
            raise ValueError("é\0")
        return {"b": 10**40, "a": 1.0, "": "\0\u2028", "raw": msgspec.Raw(b'{"x":1.10,"x":1e400,"s":"\\ud800"}')}

    for name in ("out.jsonl", "out.json"):
        for items in (0, 1, 500):
            for output in (address, tmp_path / f"file-{name}"):
                await run_resumable(worker, range(items), output=output, on_error="record")
            assert await export(address, str(tmp_path / name)) == items
            assert (tmp_path / name).read_bytes() == (tmp_path / f"file-{name}").read_bytes()


@pytest.mark.parametrize("client_encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_record_is_what_it_is_whatever_encoding_the_address_asks_for(
    place: Place, address: str, tmp_path: Path, client_encoding: str
) -> None:
    """The session speaks UTF-8."""

    async def worker(item: int) -> str:
        return "☃"

    address = f"{address}&client_encoding={client_encoding}"
    await run_resumable(worker, range(3), output=address)
    await export(address, str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text().count("☃") == 3
    assert [msgspec.json.decode(record)["result"] for record in place.records()] == ["☃"] * 3


async def test_an_address_may_leave_out_the_host(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libpq takes it: the socket's folder among the options, the user from the environment."""
    monkeypatch.setenv("PGUSER", "postgres")
    address = f"postgresql:///{place.name}?host={place.server.socket}&run=x"
    await resume(address, 3)
    assert place.doubled("x") == [0, 2, 4]
    assert (await verify_database(address)).checkpoint == address


async def test_another_job_is_refused_and_nothing_has_changed(place: Place, address: str) -> None:
    """What another job has left stays as it is, unless the new one is to begin anew."""
    await interrupt(address)
    before = place.everything()
    with pytest.raises(JobMismatch, match="version None, not '2'"):
        await resume(address, version="2")
    assert place.everything() == before
    await resume(address, version="2", fresh=True)
    assert len(place.doubled()) == 20


async def test_a_job_of_which_nothing_is_done_leaves_no_row(place: Place, address: str) -> None:
    """A worker that fails at once leaves nothing but the tables, and nothing of another run is touched."""
    with pytest.raises(ItemFailed):
        await run_resumable(Worker(0), range(5), output=address, concurrency=1)
    assert place.everything() == [[("(1)",)], [], [], [], [], []]
    await resume(f"{address}&run=other", 3)
    with pytest.raises(ItemFailed):
        await run_resumable(Worker(0), range(5), output=address, concurrency=1)
    assert place.sql("SELECT name FROM async_recovery_run") == [("other",)]


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE async_recovery_record SET record = replace(record::text, '4', '5')::json WHERE "index" = 2""",
        """DELETE FROM async_recovery_record WHERE "index" = 2""",
        """INSERT INTO async_recovery_record VALUES (1, 19, '{"index":19}')""",
    ],
)
async def test_changed_records_are_found(place: Place, address: str, change: str) -> None:
    """A record that was changed, removed or added is found: before a resume publishes, and by verify."""
    await interrupt(address)
    assert (await verify_database(address)).problems == []
    place.sql(change)
    assert [subject for subject, _ in (await verify_database(address)).problems] == ["output"]
    with pytest.raises(OutputChanged, match=r"--fresh"):
        await resume(address)
    assert place.doubled() == []


async def test_damaged_rows_ahead_cost_their_items_alone(place: Place, address: str) -> None:
    """An item whose row is damaged is done again, no other; the row that is in the way of the new one goes."""
    ledger = await begun(place)
    await ledger.close()
    place.sql("UPDATE async_recovery_ahead SET item_crc = 1")
    assert (await mark_of(address)) == (1, {})
    ledger = PostgresLedger(address)
    await ledger.open(JOB)
    await ledger.commit(commit(3, 1, [], [3]))
    await ledger.close()
    assert (await mark_of(address)) == (1, {3: Ahead(3, 33, b'{"index":3}')})


async def test_a_damaged_checkpoint_is_put_aside_or_refused(place: Place, address: str) -> None:
    """A line that can not be read: refused if that is asked for, else its records stay under another name."""
    await interrupt(address)
    place.sql("UPDATE async_recovery_run SET checkpoint = replace(checkpoint, 'mark', 'Mark')")
    with pytest.raises(CheckpointUnusable, match="can not be read"):
        await resume(address, on_damage="refuse")
    await resume(address)
    names = place.sql("SELECT name, complete FROM async_recovery_run ORDER BY name")
    assert names == [("default", True), ("default.damaged-1", False)]


async def test_a_kept_run_is_compared_and_not_done_again(place: Place, address: str) -> None:
    """With keep_checkpoint the same call runs nothing, if its records are still those that were written."""
    await resume(address, keep_checkpoint=True)
    assert (await resume(address, keep_checkpoint=True)).ran == []
    place.sql("UPDATE async_recovery_record SET record = replace(record::text, '4', '5')::json")
    with pytest.raises(OutputChanged):
        await resume(address, keep_checkpoint=True)


async def test_a_lost_connection_is_made_again_and_each_commit_is_there_once(place: Place, address: str) -> None:
    """Cut off before each of its steps, a ledger goes on, and what it has left is what it would have left otherwise."""
    ledger = await begun(place)
    place.cut_off()
    await ledger.show(NOT_BEGUN)
    await ledger.commit(commit(3, 2, [1], [4]))
    place.cut_off()
    await ledger.audit()
    await ledger.commit(commit(4, 4, [2, 3], []))
    place.cut_off()
    await ledger.close()
    assert await mark_of(address) == (4, {4: Ahead(4, 44, b'{"index":4}')})


async def test_a_run_whose_server_is_restarted_goes_on(place: Place, address: str) -> None:
    """The workers go on meanwhile as far as the window reaches; no item runs twice."""
    all_run = asyncio.Event()

    class Restarting(Worker):
        async def __call__(self, item: int) -> Any:
            if item == 30:
                await asyncio.to_thread(place.server.stop_at_once)
            result = await super().__call__(item)
            if len(self.ran) == 200:
                all_run.set()
            return result

    Restarting.__qualname__ = Worker.__qualname__
    worker = Restarting()
    run = asyncio.ensure_future(
        run_resumable(worker, range(200), output=address, concurrency=2, checkpoint_interval=0.01)
    )
    try:
        waiting = asyncio.ensure_future(all_run.wait())
        await asyncio.wait({run, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert not run.done()
    finally:
        place.server.start()
    await run
    await waiting
    assert sorted(worker.ran) == list(range(200))
    assert place.doubled() == [2 * n for n in range(200)]


async def test_a_server_that_stays_away_fails_the_storage_in_the_end(place: Place) -> None:
    """After the time that was given, with the durable mark in the message; a next run resumes there."""
    waited = []

    async def wait(delay_s: float) -> None:
        waited.append(delay_s)

    ledger = await begun(place, patience_s=20, sleep=wait)
    place.server.stop_at_once()
    try:
        for _ in range(2):
            with pytest.raises(StorageFailed, match=r"up to the mark 1 and ahead of it"):
                await ledger.commit(commit(3, 2, [1], []))
        await ledger.close()
    finally:
        place.server.start()
    assert waited == [delay_s for delay_s in delays(20) if delay_s]
    assert 20 <= sum(waited) <= 25
    assert (await mark_of(place.address))[0] == 1


async def test_a_server_that_does_not_answer_fails_the_storage_in_that_time(place: Place) -> None:
    """The time is that of all tries together, also of those that nobody answers."""
    ledger = await begun(place, patience_s=0.1)
    with place.server.silent():
        async with asyncio.timeout(9):  # less than one try to connect may take
            with pytest.raises(StorageFailed, match=r"up to the mark 1 and ahead of it"):
                await ledger.commit(commit(3, 2, [1], []))
    await ledger.close()
    assert (await mark_of(place.address))[0] == 1


@pytest.mark.parametrize("how", ["silent", "away"])
async def test_a_second_stop_does_not_wait_for_a_server(
    place: Place, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The commit that waits for the server is given up; what was durable is, and the same call resumes."""
    monkeypatch.setattr(postgres, "HASTE_S", 0.1)
    stuck = asyncio.Event()

    class Waiting(Worker):
        async def __call__(self, item: int) -> Any:
            if item == 30:
                stuck.set()
                await asyncio.Event().wait()
            return await super().__call__(item)

    Waiting.__module__, Waiting.__qualname__ = Worker.__module__, Worker.__qualname__
    run = asyncio.ensure_future(
        run_resumable(Waiting(), range(60), output=address, concurrency=1, batch_size=10, checkpoint_interval=1e9)
    )
    await stuck.wait()
    with contextlib.ExitStack() as until_then:
        if how == "silent":
            until_then.enter_context(place.server.silent())
        else:
            place.server.stop_at_once()
            until_then.callback(place.server.start)
        async with asyncio.timeout(9):
            for _ in range(2):
                run.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await run
    worker = await resume(address, 60)
    assert min(worker.ran) in (0, 10, 20, 30)
    assert place.doubled() == [2 * n for n in range(60)]


async def test_who_was_taken_over_writes_nothing(place: Place, address: str) -> None:
    """A ledger that has lost its lock unnoticed, and one whose session ended: fenced, whatever they try."""
    for lose in ("lock", "session"):
        stopped = await begun(place)
        await _lose(place, stopped, lose)
        other = PostgresLedger(address)
        found = await other.open(JOB)
        assert found.state is not None
        await other.commit(commit(found.state.generation + 1, found.state.mark, [], [5]))
        there = place.everything()
        for step in (stopped.commit(commit(3, 2, [1], [])), stopped.commit(commit(3, 2, [1], []))):
            with pytest.raises(AlreadyRunning, match="was taken over by another process"):
                await step
        await stopped.show(NOT_BEGUN)
        await stopped.close()
        assert place.everything() == there
        await other.close()
        place.sql("DROP VIEW async_recovery_results")
        place.sql(
            "DROP TABLE async_recovery_schema, async_recovery_fence, async_recovery_run, async_recovery_record, "
            "async_recovery_ahead, async_recovery_spent"
        )


async def _lose(place: Place, ledger: PostgresLedger, what: str) -> None:
    if what == "session":
        place.cut_off()
        return
    await ledger._session.run(lambda: ledger._session.connection.execute("SELECT pg_advisory_unlock_all()"))


async def test_of_two_that_begin_at_once_one_is_fenced(place: Place, address: str) -> None:
    """Also when no row was there before, and the lock had not held: the second does not replace the first."""
    first, second = PostgresLedger(address), PostgresLedger(address)
    await first.open(JOB)
    await _lose(place, first, "lock")
    await second.open(JOB)
    await second.commit(commit(1, 0, [], []))
    await second.commit(commit(2, 1, [0], []))
    with pytest.raises(AlreadyRunning):
        await first.commit(commit(1, 0, [], []))
    await first.close()
    await second.commit(commit(3, 2, [1], []))
    await second.close()
    assert (await mark_of(address))[0] == 2


async def test_a_held_run_is_refused_and_shown(place: Place, address: str) -> None:
    """A second run of the name is refused and told who holds it; `status` and `verify` show it, and touch nothing."""
    ledger, second = await begun(place), PostgresLedger(address, sleep=never)
    with pytest.raises(AlreadyRunning, match=rf"is held by process {os.getpid()} on "):
        await second.open(JOB)
    await second.close()
    await ledger.show(NOT_BEGUN)
    before = place.everything()
    report = await verify_database(address)
    status = await asyncio.to_thread(read_status, address)
    assert (report.state, report.records, report.problems) == ("running", 1, [])
    assert (status.state, status.mark, status.ahead) == ("running", 1, 1)
    assert status.running is not None
    assert status.running["pid"] == os.getpid()
    assert place.everything() == before
    await ledger.close()
    assert (await verify_database(address)).state == "interrupted"


@pytest.mark.parametrize("ends_after", [1, 6, 7])
async def test_a_start_waits_a_moment_for_the_end_of_a_killed_one(place: Place, address: str, ends_after: int) -> None:
    """The server notices a kill a little later; after some three seconds it is none, and the start is refused."""
    killed, waited = await begun(place), list[float]()

    async def wait(delay_s: float) -> None:
        waited.append(delay_s)
        if len(waited) == ends_after:
            await killed.close()

    second = PostgresLedger(address, sleep=wait)
    with pytest.raises(AlreadyRunning) if ends_after == 7 else contextlib.nullcontext():
        assert (await second.open(JOB)).state is not None
    await second.close()
    assert len(waited) == min(ends_after, 6)
    assert sum(waited) < 4
    await killed.close()


def with_a_schema_of_its_own(place: Place) -> str:
    """The address for a user whose search_path begins with another schema than that of the others."""
    user = f"alice_{place.name}"
    place.sql(f"CREATE ROLE {user} LOGIN SUPERUSER")
    place.sql(f"CREATE SCHEMA {user} AUTHORIZATION {user}")
    return place.server.address(place.name, user=user)


async def test_a_run_is_held_for_a_user_with_a_schema_of_its_own(place: Place, address: str) -> None:
    """The lock follows the tables that are found, not the schema where the user would make new ones."""
    ledger, alice = await begun(place), with_a_schema_of_its_own(place)
    second = PostgresLedger(alice, sleep=never)
    with pytest.raises(AlreadyRunning, match=rf"is held by process {os.getpid()} on "):
        await second.open(JOB)
    await second.close()
    assert (await asyncio.to_thread(read_status, alice)).state == "running"
    await ledger.commit(commit(3, 2, [1], []))
    await ledger.close()
    assert (await mark_of(alice))[0] == 2


async def test_of_two_with_other_schemas_that_begin_at_once_each_holds_its_run(place: Place, address: str) -> None:
    """Whoever comes second uses the tables of the first: fenced from its run, and seen to hold its own."""
    alice = with_a_schema_of_its_own(place)
    first, same, other = (PostgresLedger(a) for a in (address, alice, f"{alice}&run=other"))
    for ledger in (first, same, other):
        await ledger.open(JOB)
    await first.commit(commit(1, 0, [], []))
    with pytest.raises(AlreadyRunning):
        await same.commit(commit(1, 0, [], []))
    await other.commit(commit(1, 0, [], []))
    await other.commit(commit(2, 1, [0], []))
    third = PostgresLedger(f"{address}&run=other", sleep=never)
    with pytest.raises(AlreadyRunning, match=rf"is held by process {os.getpid()} on "):
        await third.open(JOB)
    for ledger in (first, same, other, third):
        await ledger.close()
    assert place.sql(
        "SELECT nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE relname = 'async_recovery_fence'"
    ) == [("public",)]


async def test_a_complete_run_is_foretold_to_start_anew_whatever_has_changed(place: Place, address: str) -> None:
    """As in SQLite: a changed record is a problem to `verify`, but none of the same line."""
    await resume(address)
    place.sql("UPDATE async_recovery_record SET record = replace(record::text, '38', '39')::json")
    report = await verify_database(address)
    assert ([subject for subject, _ in report.problems], report.next) == (["output"], "starts anew")
    source = as_source(range(25))
    job = Run(Worker(), source, ledger_of(address), Options()).job
    report = await verify_database(address, source=source, job=job)
    assert (report.state, report.problems, report.next) == ("complete", [], "starts anew")
    assert len((await resume(address, items=25)).ran) == 25


FAILED = [0, 7, 8, 31, 59]


async def fail(address: str, **options: Any) -> None:
    """A complete run with failures."""
    await run_resumable(Worker(*FAILED), range(60), output=address, on_error="record", **options)


@pytest.mark.slow  # SQLite has them on each change; what differs is in the tests above
class TestPostgresFailures(SourceContract):
    """The failures of a complete run are a source like any other."""

    can_change = True

    @pytest.fixture(autouse=True)
    async def _place(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "SLICE_BYTES", 200)
        await fail(place.address)
        self.place = place

    def make(self) -> Source:
        return DatabaseFailures(self.place.address)

    def change(self) -> None:
        changed = """record = replace(record::text, 'é', 'è')::json WHERE "index" = 7"""
        self.place.sql(f"UPDATE async_recovery_record SET {changed}")


async def test_the_failed_items_run_again_and_the_run_is_whole_afterwards(
    place: Place, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted and cut off, a retry goes on; then records and checksum are those of a run that never failed."""
    monkeypatch.setattr(database, "SLICE_BYTES", 200)
    await run_resumable(Worker(), range(60), output=tmp_path / "expected.jsonl")
    await fail(address, keep_checkpoint=True)

    class Broken(Worker):
        async def __call__(self, item: int) -> Any:
            if item == 31:
                raise KeyboardInterrupt
            return await super().__call__(item)

    Broken.__module__, Broken.__qualname__ = Worker.__module__, Worker.__qualname__
    with pytest.raises(ItemFailed):
        await retry_failed(Broken(), address, concurrency=1, batch_size=1)
    assert [subject for subject, _ in (await verify_database(address)).problems] == ["retry"]
    with pytest.raises(Mismatch, match=r"failed items of .* are being run again"):
        await fail(address)
    worker = Worker()
    summary = await retry_failed(worker, address)
    assert (worker.ran, summary.failed) == (FAILED[3:], 0)
    await export(address, str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert place.sql("SELECT name, complete, kept FROM async_recovery_run") == [("default", True, True)]
    with pytest.raises(UsageError, match="there is no complete run 'no'"):
        await retry_failed(Worker(), f"{address}&run=no")


async def test_the_process_that_runs_failed_items_again_is_named(
    place: Place, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `status`, and by a run and a second retry that are refused; not the one that did the run before."""
    monkeypatch.setattr(postgres, "LOCK_DELAYS_S", ())
    await fail(address)
    place.sql('UPDATE async_recovery_fence SET holder = \'{"pid":1,"host":"gone","started":0}\'')
    told: list[Any] = []

    class Looking(Worker):
        async def __call__(self, item: int) -> Any:
            if not told:
                status = await asyncio.to_thread(read_status, address)
                assert status.running is not None
                told.append((status.state, status.running["pid"]))
                with pytest.raises(AlreadyRunning, match=rf"is held by process {os.getpid()} on "):
                    await fail(address)
                with pytest.raises(AlreadyRunning, match=rf"is held by process {os.getpid()} on "):
                    await retry_failed(Worker(), address)
            return await super().__call__(item)

    Looking.__module__, Looking.__qualname__ = Worker.__module__, Worker.__qualname__
    assert (await retry_failed(Looking(), address, concurrency=1)).failed == 0
    assert told == [("running", os.getpid())]


async def test_the_failed_items_of_a_run_with_the_longest_name_run_again(place: Place, address: str) -> None:
    """What names the retry is not counted."""
    address = f"{address}&run={'n' * 200}"
    await fail(address)
    assert (await retry_failed(Worker(), address)).failed == 0


# What can not be used


def _other_schema(place: Place) -> str:
    place.sql("CREATE TABLE async_recovery_schema (version int)")
    place.sql("INSERT INTO async_recovery_schema VALUES (99)")
    return place.address


def _reader(place: Place) -> str:
    return place.server.address(place.name, user="reader")


def _reader_of_tables(place: Place) -> str:
    asyncio.run(resume(place.address, 3))
    place.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    return _reader(place)


def _only_to_be_read(place: Place) -> str:
    return f"{place.address}&default_transaction_read_only=on"


def _wrong_encoding(place: Place) -> str:
    name = f"{place.name}_latin"
    place.sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    return place.server.address(name)


Make = Callable[[Place], str]


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    """Commands that are started quickly."""
    with ForkServer() as forks:
        yield forks


def as_ended(reply: Reply) -> Ended:
    """The same, without what only the other tests ask for."""
    return Ended(reply.code, reply.out, reply.err)


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda place: place.server.address(place.name, user="secretive:wr0ng"), 2, "password authentication failed"),
        (lambda place: place.server.address("no_such"), 2, 'database "no_such" does not exist'),
        (lambda place: "postgresql://u:wr0ng@127.0.0.1:1/d", 74, "no server answers"),
        (lambda place: "postgresql://u:wr0ng@[::1", 2, "is no address of a database"),
        (lambda place: "postgresql://u:wr0/ng@h/d", 2, "is no address of a database"),
        (lambda place: "postgresql://u:wr0ng@h:x/d", 2, "is no address of a database"),
        (lambda place: "postgresql://u:wr0ng@h/d?sslmode=wr", 2, "can not be used"),
        (_other_schema, 4, "have the version 99, this one reads 1"),
        (_reader, 2, "may not make tables"),
        (_reader_of_tables, 2, "may not write to the tables"),
        (_only_to_be_read, 2, "may only be read"),
        (_wrong_encoding, 2, "has the encoding LATIN1"),
        (lambda place: f"{place.address}&search_path=nope", 2, "of the search_path nope none exists"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
)
def test_what_can_not_be_used_is_one_line(
    place: Place, folder: Folder, forks: ForkServer, make: Make, code: int, message: str
) -> None:
    """One line, no password in it, and nothing has changed."""
    output = make(place)
    before, files = place.everything(), {*names_in(folder.path), LOG}
    ended = as_ended(
        forks.run(folder.path, "run", "--input", "items.txt", "--output", output, "--worker", "jobs:quick")
    )
    check_one_line(ended, code, message)
    assert "wr0" not in ended.err
    foretold = forks.run(folder.path, "run", "--input", "items.txt", "--output", output, "--dry-run")
    assert as_ended(foretold) == ended
    assert place.everything() == before
    assert names_in(folder.path) | {LOG} == files


async def test_a_server_that_does_not_sync_is_refused(place: Place, address: str) -> None:
    """With fsync=off what is acknowledged could be lost: nothing is begun there."""
    with place.server.setting("fsync", "off"), pytest.raises(UsageError, match="fsync=off"):
        await resume(address)
    assert place.everything() == []
    await resume(address)


async def test_a_commit_waits_for_the_disk_whatever_the_user_has_set(place: Place, address: str) -> None:
    """Each transaction has synchronous_commit=on, also for a user to whom it is off."""
    ledger = await begun(place)
    connection = ledger._session.connection
    seen: list[Any] = []

    async def look() -> None:
        await connection.execute("SET synchronous_commit = off")

    await ledger._session.run(look)
    pass_fence = ledger._pass_fence

    async def looking(connection: Any, *given: Any) -> None:
        seen.append(await connection.fetchval("SHOW synchronous_commit"))
        await pass_fence(connection, *given)

    ledger._pass_fence = looking  # type: ignore[method-assign, assignment]
    await ledger.commit(commit(3, 2, [1], []))
    await ledger.close()
    assert seen == ["on"]


def test_without_asyncpg_the_extra_is_named() -> None:
    """One line that says what to install."""
    code = "import sys; sys.modules['asyncpg'] = None\nfrom async_recovery.ledgers import ledger_of\n"
    code += "try: ledger_of('postgresql://h/d')\nexcept ValueError as error: print(error)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "a database of PostgreSQL needs the extra postgres: `pip install 'async-recovery[postgres]'`"
    ]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://u:s3cr3t@h:5432/d?run=a@b&sslmode=require", "postgresql://u@h:5432/d?run=a@b&sslmode=require"),
        ("postgres://u:a%40b@h1:1,h2:2/d?password=s3cr3t&x=y", "postgres://u@h1:1,h2:2/d?x=y"),
        ("postgresql://u:s3@cr3t@h/d", "postgresql://u@h/d"),
        ("postgresql://u:s3/cr3t@h/d", "postgresql://…"),
        ("postgresql://u:s3?cr3t@h/d", "postgresql://…"),
        ("postgresql://u:s3#cr3t@h/d", "postgresql://…"),
        ("postgresql:u:s3cr3t@h/d", "postgresql://…"),
        ("PostgreSQL://u:s3cr3t@h/d", "postgresql://u@h/d"),
        ("postgresql://u@h/d?Password=s3cr3t&pass%77ord=s3cr3t&x=y", "postgresql://u@h/d?x=y"),
        ("postgresql+asyncpg://u:s3cr3t@h/d", "postgresql+asyncpg://…"),
        ("mysql://u:s3cr3t@h/d", "mysql://…"),
        ("postgresql:///d?host=%2Fs&password=s3cr3t", "postgresql:///d?host=%2Fs"),
        ("postgresql:/d?host=%2Fs", "postgresql:/d?host=%2Fs"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("sqlite://u:s3cr3t@c.db", "sqlite://…"),
        ("sqlite:///c.db?run=x&password=s3cr3t", "sqlite://…"),
        ("sqlite:///c.db?run=x&ran=y", "sqlite:///c.db?run=x&ran=y"),
        ("a:b@c", "a:b@c"),
    ],
)
def test_an_address_is_shown_without_its_password(given: str, shown: str) -> None:
    """All else stays, as far as it can be told from a password."""
    assert public(given) == shown
    assert shown_word(f"--output={given}") == f"--output={shown}"


def test_a_password_is_nowhere(server: Server, folder: Folder, forks: ForkServer) -> None:
    """Neither in what is said, by an interrupted run as by a complete one, nor in a row of the database."""
    name = server.new_database()
    server.sql(f"ALTER DATABASE {name} OWNER TO secretive")
    output = server.address(name, user="secretive:s3cr3t")
    told = []
    words = ["run", "--input", "items.txt", "--output", output, "--worker"]
    for line in (
        [*words, "jobs:quick", "--dry-run"],
        [*words, "jobs:quick", "--job-version", "2"],
        ["status", output, "--json"],
        ["verify", output],
        ["retry-failed", output, "--worker", "jobs:quick"],
        ["export", output, "out.jsonl"],
        ["run", "--input", "-", "--output", output],
        [*words, "jobs:quick", "--checkpoint", "c"],
        ["export", f"{output}&run=no", output],
    ):
        is_status = line[0] == "status"  # it ends like any program, which no fork may
        ended = folder.run(*line) if is_status else as_ended(forks.run(folder.path, *line))
        assert ended.code in (0, 2, 3), ended.err
        told.append(ended.out + ended.err)
    for table in ("fence", "run", "record", "ahead", "spent"):
        told += [row for (row,) in server.sql(f"SELECT t::text FROM async_recovery_{table} AS t", database=name)]
    told += [row for (row,) in server.sql("SELECT t::text FROM pg_stat_activity AS t")]
    assert "s3cr3t" not in "\n".join(told)


async def test_a_password_is_in_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Not even in what an error says of its cause, nor in the log, when the server goes away."""
    caplog.set_level(logging.DEBUG)
    name = server.new_database()
    server.sql(f"ALTER DATABASE {name} OWNER TO secretive")
    ledger = PostgresLedger(server.address(name, user="secretive:s3cr3t"), patience_s=1, sleep=never)
    await ledger.open(JOB)
    await ledger.commit(commit(1, 0, [], []))
    server.stop_at_once()
    try:
        with pytest.raises(StorageFailed) as failed:
            await ledger.commit(commit(2, 1, [0], []))
    finally:
        server.start()
    await ledger.close()
    assert "connection is lost" in caplog.text
    assert "s3cr3t" not in caplog.text + repr(failed.value) + repr(failed.value.__cause__)


def test_a_test_tortures_a_job_with_a_run_for_each_job(place: Place) -> None:
    """As docs/torture.md has it: the command takes no server, the function takes any ledger."""

    def ledger(folder: Path) -> Ledger:
        return PostgresLedger(place.server.address(place.name, run=folder.parent.name))

    def results(folder: Path) -> list[bytes] | None:
        return place.records(folder.parent.name) or None

    report = torture(Worker(), range(6), ledger=ledger, results=results, boundaries=3, random=0)
    assert report.ok, report
    assert len(report.kills) == 3


def test_a_run_has_the_name_in_its_address() -> None:
    """The usual one without; an address with two is refused."""
    assert [ledger_of(f"postgresql://h/d{run}").run for run in ("", "?run=x%20y")] == ["default", "x y"]  # type: ignore[attr-defined]
    assert isinstance(ledger_of("PostgreSQL://h/d"), PostgresLedger)
    with pytest.raises(UsageError, match="names two runs"):
        ledger_of("postgresql://h/d?run=a&run=b")
    for scheme in ("sqlite:///d", "postgresql://h/d"):
        for name in ("%00", "%ff", "%0a", "a%fe"):
            with pytest.raises(UsageError, match="give the run a name of printable characters"):
                split_address(f"{scheme}?run={name}")
        assert split_address(f"{scheme}?a=b&run=%C3%A9&&c=d") == (f"{scheme}?a=b&c=d", "é")
        assert split_address(f"{scheme}?run=x#f") == (f"{scheme}#f", "x")
    assert issubclass(UsageError, AsyncRecoveryError)
    assert Job("a", "b", None, "table").output == PostgresLedger.form


@pytest.mark.parametrize("address", ["sqlite:///out.db?run=x.retry", "postgresql://h/d?run=x.retry"])
def test_the_name_of_a_retry_is_none_of_a_run(address: str) -> None:
    """Otherwise it would be taken for the retry of the run `x`, and dropped with it."""
    with pytest.raises(UsageError, match=r"^run is 'x\.retry': a name that ends in \.retry is that of a retry"):
        ledger_of(address)
    assert retry_ends(address.removesuffix(".retry"))[1].output is not None


def test_delays_grow_up_to_a_bound_and_end() -> None:
    """At once, then after more and more time, never more than five seconds."""
    found = list(delays(60))
    assert found[:4] == [0, 0, 0.1, 0.2]
    assert found == sorted(found)
    assert found[-1] == 5
