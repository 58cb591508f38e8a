"""What the service keeps on disk: its database, and its folder; also after a kill at any step of a change."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
from starlette.types import Message

from async_recovery.errors import AlreadyRunning, CheckpointUnusable, StorageFailed, UsageError
from async_recovery.service import Service, api, create_service
from async_recovery.service.folder import KEPT_S, UPLOAD_ID, Folder, OutsideOfFolder
from async_recovery.service.jobs import Input, Job, JobOptions
from async_recovery.service.manager import Manager
from async_recovery.service.store import SCHEMA, Store

from .support.asgi_calls import call, piece, scope_of

NOWHERE = Input("items", "jobs/x/input.jsonl", "items", 3)


def job_of(number: int, **fields: Any) -> Job:
    """A job that nothing has happened to."""
    return Job(number, f"job-{number:016x}", "echo", NOWHERE, JobOptions(), 1.0, **fields)


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "service.db")


async def read(path: str) -> list[Job]:
    """What a service finds that starts now."""
    store = Store(path)
    try:
        return await store.open()
    finally:
        await store.close()


# The database


async def test_what_was_saved_is_read_by_the_next_one(database: str) -> None:
    """In the order of the numbers, each as it was last; what was removed is not there."""
    store = Store(database)
    assert await store.open() == []
    jobs = [job_of(number) for number in (1, 2, 3)]
    for job in jobs:
        await store.add(job)
    jobs[0] = jobs[0].made(2.0).begun(3.0)
    await store.save(jobs[0])
    await store.remove(jobs[1])
    await store.close()
    assert await read(database) == [jobs[0], jobs[2]]


async def test_no_number_is_given_twice(database: str) -> None:
    """Not even that of the last job, when it is gone, and after a restart."""
    for expected in (1, 2, 3):
        store = Store(database)
        await store.open()
        assert await store.next_number() == expected
        await store.add(job_of(expected))
        await store.remove(job_of(expected))
        assert await store.next_number() == expected + 1
        await store.close()


async def test_each_change_is_durable_when_its_call_returns(database: str, tmp_path: Path) -> None:
    """A copy of the files at that moment, as a kill leaves them, has it."""
    store = Store(database)
    await store.open()
    job = job_of(1)
    steps: list[tuple[Callable[[], Any], list[Job]]] = [
        (lambda: store.add(job), [job]),
        (lambda: store.save(job.made(2.0)), [job.made(2.0)]),
        (lambda: store.remove(job), []),
    ]
    for number, (step, expected) in enumerate(steps):
        await step()
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        for file in tmp_path.glob("service.db*"):
            await anyio.to_thread.run_sync(shutil.copy, file, copy)
        assert await read(str(copy / "service.db")) == expected
    await store.close()


async def change(path: str, *statements: str) -> None:
    """Somebody else's hands in the database."""

    def run() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        for statement in statements:
            connection.execute(statement)
        connection.close()

    await anyio.to_thread.run_sync(run)


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_later_version_is_refused_and_left_as_it_is(database: str) -> None:
    """Not one byte of it changes."""
    await change(database, f"PRAGMA user_version = {SCHEMA + 1}", "CREATE TABLE jobs (later TEXT)")
    before = Path(database).read_bytes()
    with pytest.raises(CheckpointUnusable, match=f"schema {SCHEMA + 1}, this one has {SCHEMA}"):
        await read(database)
    assert Path(database).read_bytes() == before


@pytest.mark.parametrize("row", ["'no JSON'", "'{}'", "x'ff'", "5", "2.5", "'{\"number\":1}'", "''"])
async def test_a_row_that_is_no_job_is_told_and_stays(database: str, row: str) -> None:
    """Whatever its type; the other rows stay, too."""
    store = Store(database)
    await store.open()
    await store.add(job_of(1))
    await store.add(job_of(2))
    await store.close()
    await change(database, f"UPDATE jobs SET job = {row} WHERE number = 1")
    with pytest.raises(CheckpointUnusable, match="a row of it is no job"):
        await read(database)
    await change(database, "DELETE FROM jobs WHERE number = 1")
    assert await read(database) == [job_of(2)]


@pytest.mark.parametrize("damage", ["no database at all\n" * 500, "SQLite format 3\0" + "\1" * 5000])
async def test_a_damaged_database_is_told_and_stays(database: str, damage: str) -> None:
    """What to do about it is in the message."""
    await anyio.Path(database).write_text(damage)
    with pytest.raises(CheckpointUnusable, match=r"can not be read as the service's database: .*move it aside"):
        await read(database)
    assert await anyio.Path(database).read_text() == damage


async def test_a_database_that_can_not_be_opened_is_a_failure_of_the_storage(tmp_path: Path) -> None:
    """A folder at its place, or none around it."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "service.db"):
        with pytest.raises(StorageFailed, match="unable to open"):
            await read(str(path))


async def test_a_write_that_fails_changes_nothing_and_the_next_can_succeed(database: str) -> None:
    """A full disk, a database that can only be read, a number that is taken: each is a failure of the storage."""
    store = Store(database)
    await store.open()
    await store.add(job_of(1))
    for pragma, back in (("query_only = 1", "query_only = 0"), ("max_page_count = 1", "max_page_count = 1000000")):
        connection = store._connection
        await anyio.to_thread.run_sync(connection.execute, f"PRAGMA {pragma}")
        long = job_of(2, reason="x" * 100_000)
        with pytest.raises(StorageFailed, match=r"failed: .* Nothing was changed"):
            await store.add(long)
        with pytest.raises(StorageFailed):
            await store.save(job_of(1, reason="x" * 100_000))
        await anyio.to_thread.run_sync(connection.execute, f"PRAGMA {back}")
    with pytest.raises(StorageFailed, match="UNIQUE"):
        await store.add(job_of(1))
    await store.add(job_of(2))
    await store.close()
    assert await read(database) == [job_of(1), job_of(2)]


async def test_a_closed_store_says_so(database: str) -> None:
    """A request that comes too late gets an error of ours."""
    store = Store(database)
    await store.open()
    await store.close()
    with pytest.raises(StorageFailed, match="is closed"):
        await store.add(job_of(1))


# Kills


class Copying:
    """A copy of the service's folder before each step of it on the disk and in the database."""

    def __init__(self, data: Path, copies: Path) -> None:
        self._data, self._copies = data, copies
        self.names: list[str] = []

    @property
    def folders(self) -> list[Path]:
        return [self._copies / name for name in self.names]

    def copy(self, name: str) -> None:
        self.names.append(f"{len(self.names)}-{name}")
        shutil.copytree(self._data, self._copies / self.names[-1], symlinks=True)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each of these calls is a step."""
        folder_steps = ("new_job", "write_items", "settle", "drop", "give_up", "delete")
        store_steps = ("_next_number", "_write")
        for owner, names in ((Folder, folder_steps), (Store, store_steps)):
            for name in names:
                monkeypatch.setattr(owner, name, self._copied_around(name, getattr(owner, name)))

    def _copied_around(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def copied(*arguments: Any, **named: Any) -> Any:
            self.copy(f"before-{name}")
            result = step(*arguments, **named)
            self.copy(f"after-{name}")
            return result

        return copied


async def echo(item: Any) -> Any:
    return item


def manager_of(data: Path) -> Manager:
    return Manager(Folder(data), {"echo": echo})


async def submit(manager: Manager, lines: bytes = b"1\n2\n", **options: Any) -> Job:
    """A new job, its items with it."""
    make_input = partial(manager.folder.write_items, lines=lines)
    job, _ = await manager.submit("echo", JobOptions(**options), make_input)
    return job


async def until(manager: Manager, job: Job, *states: str) -> Job:
    """The job, once it is in such a state; it is told when it changes."""
    async for _ in manager.feed(job.id).messages(None):
        if (now := manager.jobs[job.id]).state in states:
            return now
    raise AssertionError("the service has ended before")


async def test_a_kill_between_any_two_steps_leaves_whole_jobs_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of making a job and of deleting one: each start finds the job that was there before, and no half of another."""
    data = tmp_path / "data"
    copying = Copying(data, tmp_path / "copies")
    async with manager_of(data) as manager:
        kept = await until(manager, await submit(manager, b'"kept"\n'), "complete")
        with monkeypatch.context() as context:
            copying.watch(context)
            other = await until(manager, await submit(manager), "complete")
            await manager.delete(other.id)
        assert set(manager.jobs) == {kept.id}
    assert len(copying.names) > 15
    seen = set()
    for folder in copying.folders:
        async with manager_of(folder) as manager:
            assert kept.id in manager.jobs
            for job in list(manager.jobs.values()):
                done = await until(manager, job, "complete", "failed")
                assert done.state == "complete", (folder, done.reason)
                assert Path(manager.folder.output(job)).is_file()
            seen.add(len(manager.jobs))
            assert {path.name for path in (folder / "jobs").iterdir()} == set(manager.jobs), folder
    assert seen == {1, 2}


async def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Files and folders of strangers beside the jobs, and among the uploads, whatever they are called."""
    data = tmp_path / "data"
    async with manager_of(data) as manager:
        job = await until(manager, await submit(manager), "complete")
    strange = ["mine", "job-1.new", "job-xyz.gone", f"{job.id}.new.bak", "job-0123456789abcdef", ".new", "JOB.gone"]
    for name in strange:
        (data / "jobs" / name).mkdir()
        (data / "jobs" / name / "file").write_text("mine")
        (data / "uploads" / name).mkdir()
    (data / "jobs" / "file.new").write_text("mine")
    ours = "job-00000000000000aa.new", "job-00000000000000bb.gone"
    for name in ours:
        (data / "jobs" / name / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    link = data / "jobs" / "job-00000000000000cc.gone"
    link.symlink_to(tmp_path / "elsewhere")
    old = data / "uploads" / "up-0123456789abcdef-folder"
    old.mkdir()
    os.utime(old, (1, 1))
    (data / "uploads" / "notes.txt").write_text("mine")
    os.utime(data / "uploads" / "notes.txt", (1, 1))
    async with manager_of(data) as manager:
        assert set(manager.jobs) == {job.id}
        await anyio.to_thread.run_sync(manager.folder.forget_uploads, 10 * KEPT_S)
    for name in strange:
        assert (data / "jobs" / name / "file").read_text() == "mine"
    assert not any((data / "jobs" / name).exists() for name in ours)
    assert (tmp_path / "elsewhere" / "file").exists()
    assert (data / "jobs" / "file.new").exists()
    assert old.is_dir()
    assert (data / "uploads" / "notes.txt").exists()


async def test_a_delete_that_was_half_done_is_done_by_the_next_start(tmp_path: Path) -> None:
    """The row could not go: the job is gone for everybody, and stays so."""
    async with manager_of(tmp_path) as manager:
        job = await until(manager, await submit(manager), "complete")
        await anyio.to_thread.run_sync(manager._store._connection.execute, "PRAGMA query_only = 1")
        await manager.delete(job.id)
        assert manager.jobs == {}
        assert await anyio.Path(tmp_path / "jobs" / f"{job.id}.gone").exists()
    async with manager_of(tmp_path) as manager:
        assert manager.jobs == {}
    assert list((tmp_path / "jobs").iterdir()) == []
    assert await read(str(tmp_path / "service.db")) == []


@pytest.mark.parametrize("step", ["write_items", "settle"])
async def test_a_job_that_could_not_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Not in memory, nor in the folder, nor in the database; with the same key it can be made later."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    async with manager_of(tmp_path) as manager:
        with monkeypatch.context() as context:
            context.setattr(Folder, step, full)
            with pytest.raises(OSError, match="No space"):
                await submit(manager)
        assert manager.jobs == {}
        assert [path async for path in anyio.Path(tmp_path / "jobs").iterdir()] == []
        await submit(manager)
    assert [job.number for job in await read(str(tmp_path / "service.db"))] in ([1], [2])


# Who has the folder


async def test_one_service_at_a_time_has_the_folder(tmp_path: Path) -> None:
    """The second one is refused, and the first goes on; afterwards it can be had."""
    async with manager_of(tmp_path) as manager:
        with pytest.raises(AlreadyRunning):
            await manager_of(tmp_path).__aenter__()
        await until(manager, await submit(manager), "complete")
    async with manager_of(tmp_path):
        pass


@pytest.mark.parametrize("name", ["service.lock", "jobs", "uploads"])
async def test_a_folder_that_can_not_be_used_is_told(tmp_path: Path, name: str) -> None:
    """Something else has a name that the service needs."""
    path = anyio.Path(tmp_path / name)
    await (path.mkdir() if name == "service.lock" else path.write_text(""))
    with pytest.raises(UsageError, match=r"(G|or g)ive --data another"):
        await manager_of(tmp_path).__aenter__()


async def test_a_start_that_fails_gives_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails: the next one can have it."""

    def broken(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as context:
        context.setattr(Folder, "left_unsettled", broken)
        with pytest.raises(StorageFailed, match="Input/output error"):
            await manager_of(tmp_path).__aenter__()
    await anyio.Path(tmp_path / "service.db").write_text("none\n" * 1000)
    with pytest.raises(CheckpointUnusable):
        await manager_of(tmp_path).__aenter__()
    await anyio.Path(tmp_path / "service.db").unlink()
    async with manager_of(tmp_path):
        pass


# Uploads


@pytest.fixture
async def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    await anyio.to_thread.run_sync(folder.prepare)
    await anyio.to_thread.run_sync((tmp_path / "jobs" / "job-1.new").mkdir)
    return folder


async def blocks(*parts: bytes | BaseException) -> AsyncIterator[bytes]:
    """What comes in; an error is raised at its place."""
    for part in parts:
        if isinstance(part, BaseException):
            raise part
        yield part


def link(folder: Folder, upload: str) -> Input:
    return folder.link_upload("job-1", upload, None)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "", ".", "..", "../../etc/passwd", "a/b/c.csv", "é.txt", "x" * 500, "a b\n.jsonl", "\0", "~", "-", "a~"],
)
async def test_any_name_gives_an_upload_that_lies_in_its_folder(folder: Folder, name: str) -> None:
    """Whole, and a job can be made of it; its suffix stays."""
    upload, size = await folder.receive(name, blocks(b"one\n", b"", b"two\n"))
    assert UPLOAD_ID.fullmatch(upload)
    assert size == 8
    path = anyio.Path(folder.path / "uploads" / upload)
    assert await path.read_bytes() == b"one\ntwo\n"
    assert [entry async for entry in path.parent.iterdir()] == [path]
    found = await anyio.to_thread.run_sync(link, folder, upload)
    assert (found.bytes, found.kind) == (8, "upload")
    assert name[-4:] != ".csv" or found.path.endswith(".csv")
    inside = await anyio.to_thread.run_sync(folder.find, found.path.replace("job-1/", "job-1.new/"))
    assert await anyio.Path(inside).read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConnectionError("gone")])
async def test_half_an_upload_is_none(folder: Folder, error: Exception) -> None:
    """While it comes in nobody can name it; when it breaks off, nothing of it is left."""
    seen = []

    async def breaks() -> AsyncIterator[bytes]:
        yield b"half"
        [part] = [path.name async for path in anyio.Path(folder.path / "uploads").iterdir()]
        seen.append(part)
        for named in (part, part[:-1]):
            with pytest.raises(OutsideOfFolder, match="no such upload"):
                await anyio.to_thread.run_sync(link, folder, named)
        raise error

    with pytest.raises(type(error)):
        await folder.receive("x.part", breaks())
    assert len(seen) == 1
    assert [path async for path in anyio.Path(folder.path / "uploads").iterdir()] == []


async def test_uploads_go_after_a_day_and_jobs_keep_what_they_were_made_of(folder: Folder) -> None:
    """Half ones that a kill has left go, too; younger ones stay, and are counted."""
    upload, _ = await folder.receive("a.txt", blocks(b"x"))
    young, _ = await folder.receive("b.txt", blocks(b"y"))
    uploads = folder.path / "uploads"
    half = uploads / "up-0123456789abcdef-c.txt~"
    await anyio.Path(half).write_bytes(b"z")
    await anyio.to_thread.run_sync(link, folder, upload)
    now = (uploads / young).stat().st_mtime
    assert await anyio.to_thread.run_sync(folder.forget_uploads, now + KEPT_S - 60) == 3
    for path in (uploads / upload, half):
        os.utime(path, (now - 61, now - 61))
    assert await anyio.to_thread.run_sync(folder.forget_uploads, now + KEPT_S - 60) == 1
    assert [path.name async for path in anyio.Path(uploads).iterdir()] == [young]
    assert (folder.path / "jobs" / "job-1.new" / "input-a.txt").read_bytes() == b"x"
    with pytest.raises(OutsideOfFolder):
        await anyio.to_thread.run_sync(link, folder, upload)


async def test_uploads_are_taken_again_when_the_old_ones_are_a_day_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are kept at once is a bound, and not the end of all uploads."""
    monkeypatch.setattr(api, "MOST_UPLOADS", 2)

    async def upload(service: Service) -> int:
        pieces = [piece(b"one\n")]

        async def receive() -> Message:
            return pieces.pop() if pieces else {"type": "http.disconnect"}

        return (await call(service, scope_of("/uploads", "POST", {}, host=b"localhost"), receive)).status

    async with create_service(tmp_path, {"echo": echo}) as service:
        assert [await upload(service) for _ in range(3)] == [201, 201, 429]
        for path in (tmp_path / "uploads").iterdir():
            os.utime(path, (1, 1))
        assert await upload(service) == 201


@pytest.mark.parametrize("upload", ["", "-", "--", "up-1-a", "../service.db", "up-0123456789abcdef-", "a\0b", "é"])
async def test_a_name_that_is_no_upload_links_nothing(folder: Folder, upload: str) -> None:
    """Also one that could be, but is not there."""
    for name in (upload, "up-0123456789abcdef-none.txt"):
        with pytest.raises(OutsideOfFolder, match="no such upload"):
            await anyio.to_thread.run_sync(link, folder, name)
    assert list((folder.path / "jobs" / "job-1.new").iterdir()) == []


# Paths


async def test_a_path_finds_files_in_the_folder_and_nothing_else(folder: Folder, tmp_path: Path) -> None:
    """Through symlinks only where they stay inside; never the service's own database and lock."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    (tmp_path / "in" / "service.db-wal").write_text("x")
    (tmp_path / "service.db").write_text("x")
    (tmp_path / "service.lock").write_text("x")
    (tmp_path / "alias").symlink_to("in/file")
    (tmp_path / "up").symlink_to(outside)
    (tmp_path / "database").symlink_to("service.db")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for good in ("in/file", "alias", "in/../in/file", "./in//file"):
        assert await anyio.to_thread.run_sync(folder.find, good) == str(tmp_path / "in" / "file")
    bad = ["", ".", "in", "none", "pipe", "loop", "up/secret", "../x", f"../{outside.name}/secret", "database"]
    bad += ["service.db", "service.lock", "in/service.db-wal", str(tmp_path / "in" / "file"), "a\0b", "x" * 5000]
    bad += ["in/file/x", "\ud800"]
    for path in bad:
        with pytest.raises(OutsideOfFolder):
            await anyio.to_thread.run_sync(folder.find, path)


async def test_an_input_that_leads_out_later_is_not_read(tmp_path: Path) -> None:
    """The job fails, and says that there is no such file; the file outside is not opened."""
    data = tmp_path / "data"
    async with manager_of(data) as manager:
        await anyio.Path(data / "items.txt").write_text("1\n")
        source = partial(manager.folder.input_at, "items.txt", None)
        job, _ = await manager.submit("echo", JobOptions(), lambda _: source())
        await until(manager, job, "complete")
    rows = await read(str(data / "service.db"))
    again = msgspec.structs.replace(rows[0], state="running", summary=None)
    store = Store(str(data / "service.db"))
    await store.open()
    await store.save(again)
    await store.close()
    (tmp_path / "secret").write_text("secret\n")
    (data / "items.txt").unlink()
    (data / "items.txt").symlink_to(tmp_path / "secret")
    async with manager_of(data) as manager:
        done = await until(manager, job, "complete", "failed")
        assert done.state == "failed"
        assert "there is no such file below the service's folder" in (done.reason or "")
