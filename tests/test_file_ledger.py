"""The file ledger: its locks and folders, its journal's size, and every one of its steps failing or being the last."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import pytest

from async_recovery import checkpoint, file_ledger, run_resumable
from async_recovery import journal as journal_module
from async_recovery.checkpoint import Ahead, Bookmark, Checkpoint, Commit, Complete, Job, Spent
from async_recovery.contracts import RunSummary
from async_recovery.engine import Run, to_its_end
from async_recovery.errors import (
    AlreadyRunning,
    ItemFailed,
    OutputChanged,
    StorageFailed,
    UsageError,
)
from async_recovery.file_ledger import FileLedger
from async_recovery.files import DISK, Files
from async_recovery.lock import InodeLock, Lock, read_holder
from async_recovery.options import Options
from async_recovery.progress import Progress
from async_recovery.sources import as_source

from .support.faulty_files import READING, FaultyFiles, ShortWrites
from .support.file_jobs import Worker, committed, json_lines, names_in, replay_of, snapshot
from .support.threaded_loop import run

NAMES = [f"item {number}" for number in range(9)]
JOB = Job("iterable", "tests:worker", None, "jsonl")
WHO = rf"is held by process {os.getpid()} on .*: another run is working on this output"


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is such a file system: thousands of fsyncs are then free."""
    shared = "/dev/shm"
    path = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def progress() -> Progress:
    return Progress(
        elapsed_s=1.0,
        resumed_from=0,
        executed=1,
        finished=1,
        failed=0,
        mark=1,
        durable_mark=1,
        frontier=2,
        ahead=0,
        in_flight=1,
        commits=1,
        held_by=1,
        held_s=0.5,
        share=None,
        share_at_start=None,
    )


def commit(mark: int, count: int = 0, *, generation: int = 1, ahead: list[Ahead] | None = None) -> Commit:
    """A commit of the `count` records just below `mark`."""
    return Commit(
        generation=generation,
        mark=mark,
        window=100,
        bookmark=Bookmark(None, 0, mark),
        records=[b'{"index":%d}' % index for index in range(mark - count, mark)],
        ahead=ahead or [],
        failed=0,
    )


async def begun(ledger: FileLedger) -> FileLedger:
    """Opened, with the mark 0 and then one record committed."""
    await ledger.open(JOB)
    await ledger.commit(commit(0))
    await ledger.commit(commit(1, 1, generation=2))
    return ledger


def ends(
    worker: Worker,
    folder: Path,
    *,
    files: Files = DISK,
    output: str | None = "out.jsonl",
    batch_size: int | None = None,
    names: list[str] = NAMES,
    **options: Any,
) -> RunSummary:
    """A run of the whole job over this seam."""
    source = as_source(names)
    ledger = FileLedger(None if output is None else folder / output, files=files, **options)
    settings = Options(concurrency=3, drain_timeout=0, batch_size=batch_size)
    return run(to_its_end(Run(worker, source, ledger, settings)))


# Locks


async def test_a_second_ledger_on_the_same_output_is_refused(folder: Path) -> None:
    """`AlreadyRunning` names who holds it; the first goes on, and afterwards another can begin."""
    first, second = FileLedger(folder / "out"), FileLedger(folder / "out")
    await begun(first)
    before = snapshot(folder)
    for _ in range(2):
        with pytest.raises(AlreadyRunning, match=rf"{folder}/out.lock {WHO}"):
            await second.open(JOB)
        await second.close()
        second = FileLedger(folder / "out", fresh=True)
        assert snapshot(folder) == before
    await first.commit(commit(2, 1, generation=3))
    await first.close()
    assert names_in(folder) == {"out.partial", "out.checkpoint"}
    assert (await second.open(JOB)).state is None
    await second.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a", "journal"), ("b", "journal")),
        ((None, "journal"), ("b", "journal")),
        ((None, "journal"), (None, "journal")),
        (("a", None), ("b", "a.checkpoint")),
        (("b", "a.checkpoint"), ("a", None)),
        ((None, "a.checkpoint"), ("a", None)),
        (("a", None), (None, "a.checkpoint")),
        (("a", None), ("link", None)),
        (("a", "journal"), ("b", "journal link")),
    ],
)
async def test_two_runs_never_share_a_journal(
    folder: Path, first: tuple[str | None, str | None], second: tuple[str | None, str | None]
) -> None:
    """However output and checkpoint are named, the second run that would write the same journal is refused."""
    (folder / "link").symlink_to("a")
    (folder / "journal link").symlink_to("journal")

    def ledger(names: tuple[str | None, str | None]) -> FileLedger:
        return FileLedger(*[None if name is None else folder / name for name in names])

    holder, other = ledger(first), ledger(second)
    await begun(holder)
    before = snapshot(folder)
    with pytest.raises(AlreadyRunning, match=WHO):
        await other.open(JOB)
    await other.close()
    assert snapshot(folder) == before
    await holder.close()
    assert not [name for name in names_in(folder) if name.endswith(".lock")]


async def test_two_outputs_with_journals_of_their_own_run_side_by_side(folder: Path) -> None:
    """Locks are no wider than what is shared."""
    one, two = FileLedger(folder / "a"), FileLedger(folder / "b", folder / "c.checkpoint")
    await begun(one)
    await begun(two)
    await one.close()
    await two.close()


async def test_two_names_of_one_partial_output_are_not_worked_on_at_once(folder: Path) -> None:
    """A hard-linked partial output is locked itself: `AlreadyRunning`, and its bytes are let alone."""
    holder = await begun(FileLedger(folder / "a"))
    os.link(folder / "a.partial", folder / "b.partial")
    shutil.copy(folder / "a.checkpoint", folder / "b.checkpoint")
    before = snapshot(folder)
    other = FileLedger(folder / "b")
    with pytest.raises(AlreadyRunning, match=f"{folder}/b.partial {WHO}"):
        await other.open(JOB)
    await other.close()
    assert snapshot(folder) == before
    fresh = FileLedger(folder / "b", fresh=True)  # starts a file of its own
    await begun(fresh)
    await fresh.close()
    assert (folder / "a.partial").read_bytes() == b'{"index":0}\n'
    await holder.close()


async def test_closing_can_happen_at_any_time_and_more_than_once(folder: Path) -> None:
    """Before opening, after a refusal, twice: the lock is gone, and nothing else happens."""
    never = FileLedger(folder / "out")
    await never.close()
    await never.close()
    ledger = await begun(FileLedger(folder / "out"))
    for _ in range(3):
        await ledger.close()
        assert names_in(folder) == {"out.partial", "out.checkpoint"}


async def test_the_lock_tells_who_holds_it_and_where_the_run_stands(folder: Path) -> None:
    """The lock's file holds pid, host, start and progress as JSON, for people, as long as the run lasts."""
    ledger = await begun(FileLedger(folder / "out", folder / "journal"))
    await ledger.show(progress())
    for name in ("out.lock", "journal.lock"):
        note = json.loads((folder / name).read_bytes())
        assert (note["pid"], note["progress"]["mark"]) == (os.getpid(), 1)
        assert note["host"]
        holder = read_holder(str(folder / name))
        assert holder is not None
        assert holder.pid == os.getpid()
    await ledger.close()
    assert read_holder(str(folder / "out.lock")) is None


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_run_whose_lock_file_was_removed_is_not_harmed(folder: Path, *, fresh: bool) -> None:
    """The partial output is locked as well: the second run is refused, and touches nothing of the first."""
    first = await begun(FileLedger(folder / "out"))
    (folder / "out.lock").unlink()
    before = snapshot(folder)
    second = FileLedger(folder / "out", fresh=fresh)
    with pytest.raises(AlreadyRunning):
        await second.open(JOB)
    await second.close()
    assert snapshot(folder) == before
    await first.commit(commit(2, 1, generation=3))
    await first.close()
    again = FileLedger(folder / "out")
    found = (await again.open(JOB)).state
    await again.close()
    assert found is not None
    assert found.mark == 2


@pytest.mark.parametrize("left", [b"", b'{"pid":1,"host":"gone","started":1.0}\n', b"\0" * 100])
async def test_a_lock_file_that_a_killed_run_left_is_no_lock(folder: Path, left: bytes) -> None:
    """Only the kernel's lock counts: a stale file is taken over, nobody is said to hold it, and it goes afterwards."""
    (folder / "out.lock").write_bytes(left)
    assert read_holder(str(folder / "out.lock")) is None
    ledger = await begun(FileLedger(folder / "out"))
    await ledger.close()
    assert names_in(folder) == {"out.partial", "out.checkpoint"}


@pytest.mark.parametrize("left", [b"", b'{"pid":1,"host":"gone","started":1.0}\n'])
def test_a_holder_is_named_before_its_file_says_so(folder: Path, left: bytes) -> None:
    """What a killed run wrote there, or nothing, is not what a second run is told: the kernel knows the holder."""
    path = folder / "out.lock"
    path.write_bytes(left)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match=rf"{path} {WHO}"):
            Lock(str(path)).acquire()
    assert path.read_bytes() == left


@pytest.mark.parametrize(
    ("left", "who"),
    [(b"", "another process"), (b'{"pid":1,"host":"there","started":1.0}\n', "process 1 on there")],
)
def test_a_holder_that_the_kernel_does_not_tell_is_named_by_its_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, left: bytes, who: str
) -> None:
    """Without the kernel's list (another system, another container) the lock's file is all there is."""
    path = folder / "out.lock"
    path.write_bytes(left)
    monkeypatch.setattr("async_recovery.lock._flocks", lambda: None)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match=f"{path} is held by {who}: "):
            Lock(str(path)).acquire()


def test_a_lock_file_that_goes_between_opening_and_locking_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder unlinks the file under the feet of the next: what is locked in the end is what lies there."""
    path = folder / "lock"
    flock, rounds = fcntl.flock, list[int]()

    def flock_late(descriptor: int, operation: int) -> None:
        if len(rounds) < 3:
            path.unlink()
        if len(rounds) == 2:
            path.write_bytes(b"of another process")
        rounds.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    lock = Lock(str(path))
    lock.acquire()
    assert len(rounds) == 4
    with pytest.raises(AlreadyRunning):
        Lock(str(path)).acquire()
    lock.release()
    assert not path.exists()


def test_a_lock_that_was_moved_away_is_not_taken_from_somebody_else(folder: Path) -> None:
    """At the end only the file that this run holds is unlinked."""
    path = folder / "lock"
    mine, others = Lock(str(path)), Lock(str(path))
    mine.acquire()
    path.unlink()
    others.acquire()
    mine.release()
    assert path.exists()
    with pytest.raises(AlreadyRunning):
        Lock(str(path)).acquire()
    others.release()
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["Lock", "InodeLock"])
def test_a_forked_child_does_not_keep_the_lock(folder: Path, kind: str) -> None:
    """When its parent dies, a child that goes on does not hold the output; forking does not free it before."""
    path = folder / "file"
    path.touch()
    held: Lock | InodeLock
    if kind == "Lock":
        held = Lock(str(path))
        held.acquire()
    else:
        held = InodeLock(str(path))
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.write(ready[1], b".")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)  # the child lives, and has left its handlers behind
        with pytest.raises(AlreadyRunning):
            InodeLock(str(path))
        held.forget()  # what the death of this process would do
        InodeLock(str(path)).forget()
    finally:
        for descriptor in (*ready, *done):
            os.close(descriptor)
        os.waitpid(child, 0)


# Folders


def test_folders_are_made(folder: Path) -> None:
    """The output's and the checkpoint's folders are made, and stay with what was begun in them."""
    ends(Worker(), folder, output="a/b/out.jsonl", checkpoint=folder / "c" / "d" / "journal")
    assert (folder / "a" / "b" / "out.jsonl").read_bytes() == json_lines(NAMES)
    assert (folder / "c" / "d").is_dir()
    with pytest.raises(ItemFailed):
        ends(Worker(fails={NAMES[0]}), folder, output="e/out.jsonl")
    assert names_in(folder / "e") == {"out.jsonl.partial", "out.jsonl.checkpoint"}


def test_folders_that_were_made_for_nothing_are_removed(folder: Path) -> None:
    """A run that is refused before anything began leaves no folder; what others put there stays."""
    with pytest.raises(UsageError, match="there is no input file"):
        run(run_resumable(Worker(), folder / "missing", output=folder / "a/b/out", checkpoint=folder / "c/d/journal"))
    assert names_in(folder) == set()

    async def main() -> None:
        ledger = FileLedger(folder / "a" / "b" / "out")
        await ledger.open(JOB)
        (folder / "a" / "others").touch()
        await ledger.close()

    run(main())
    assert snapshot(folder).keys() == {"a", "a/others"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_the_lock_is_no_mistake_of_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No room for the lock, or an I/O error: the storage failed, by name, and the same line may be tried again."""

    def fails(lock: Lock) -> None:
        raise OSError(number, os.strerror(number), lock.path)

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "acquire", fails)
        with pytest.raises(StorageFailed, match=f"{folder}/out.jsonl.lock: .*errno {number}"):
            ends(Worker(), folder)
    assert snapshot(folder) == {}
    ends(Worker(), folder)


def test_a_lock_that_fails_to_close_fails_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is complete by then, and the descriptor is closed all the same: the summary is returned."""
    close, failed = os.close, []

    def fails(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        close(descriptor)
        if ".lock" in path or path.endswith("out.jsonl"):  # the lock's file, and both descriptors of the output
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fails)
        assert ends(Worker(), folder).executed == len(NAMES)
    assert failed == [*2 * [f"{folder}/out.jsonl"], f"{folder}/out.jsonl.lock (deleted)"]
    assert names_in(folder) == {"out.jsonl"}


def test_a_folder_that_can_not_be_is_a_usage_error(folder: Path) -> None:
    """A file in the way, a folder as output or checkpoint: named, nothing made, nothing touched."""
    (folder / "file").write_bytes(b"precious")
    (folder / "sub").mkdir()
    before = snapshot(folder)
    for output, journal, match in [
        ("file/out", None, f"the folder of {folder}/file/out can not be written to: NotADirectoryError"),
        ("file/a/out", None, f"the folder of {folder}/file/a/out can not be written to: NotADirectoryError"),
        ("new/out", "file/sub/journal", "can not be written to: NotADirectoryError"),
        ("sub", None, f"{folder}/sub is a folder: name a file in it"),
        ("out", "sub", f"{folder}/sub is a folder: name a file in it"),
        ("o" * 300, None, "is too long a name: choose a shorter one"),
        ("o" * 241, None, "o.checkpoint.tmp is too long a name: choose a shorter one"),
    ]:
        with pytest.raises(UsageError, match=match):
            ends(Worker(), folder, output=output, checkpoint=None if journal is None else folder / journal)
        assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("denied", "says"),
    [
        ("", "the folder of .*out.jsonl can not be written to"),
        ("out.jsonl.lock", "the folder of .*out.jsonl can not be written to"),
        ("out.jsonl.partial", "out.jsonl.partial can not be used"),
        ("out.jsonl.checkpoint", "out.jsonl.checkpoint can not be used"),
    ],
)
def test_what_may_not_be_written_is_foretold(
    folder: Path, monkeypatch: pytest.MonkeyPatch, denied: str, says: str
) -> None:
    """Without touching anything; a folder that is missing will be made in one that is there."""
    for name in ("lock", "partial", "checkpoint"):
        (folder / f"out.jsonl.{name}").touch()
    before = snapshot(folder)
    for ledger in (FileLedger(folder / "out.jsonl"), FileLedger(folder / "new" / "deep" / "out.jsonl")):
        ledger.check_writable()
    FileLedger(None, folder / "in.checkpoint").check_writable()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder / denied)
    with pytest.raises(UsageError, match=says):
        FileLedger(folder / "out.jsonl").check_writable()
    if denied == "out.jsonl.checkpoint":
        FileLedger(folder / "out.jsonl", fresh=True).check_writable()  # it will be replaced, and not written to
    assert snapshot(folder) == before


def test_only_a_complete_job_that_was_not_kept_is_over() -> None:
    """Then the same line starts anew, whatever has become of its input and records."""
    complete = Complete(1, JOB, None, Bookmark(None, 1, 0), 1, 1, {})
    assert not Checkpoint().is_over
    assert Checkpoint(complete=complete).is_over
    assert not Checkpoint(complete=complete, kept=True).is_over


def test_a_symlink_in_a_circle_is_never_replaced(folder: Path) -> None:
    """It leads to no file that could be meant: refused, and left as it is."""
    (folder / "out").symlink_to("other")
    (folder / "other").symlink_to("out")
    before = snapshot(folder)
    with pytest.raises(UsageError, match="is a symlink that leads nowhere but in a circle"):
        ends(Worker(), folder, output="out")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output": 5}, "output is 5: it must be the path of a file"),
        ({"output": ""}, "output is '': it must be the path of a file"),
        ({"output": "a\0b"}, "output is 'a.x00b': it must be the path of a file"),
        ({"output": "out", "checkpoint": []}, "checkpoint is .*: it must be the path of a file"),
        ({"output": "out", "on_damage": "foo"}, "on_damage is 'foo': it must be 'restart' or 'refuse'"),
    ],
)
def test_an_argument_that_can_not_be_used_is_refused(options: dict[str, Any], match: str) -> None:
    """Each with a message that names it, before anything is touched."""
    with pytest.raises(UsageError, match=match):
        FileLedger(**options)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/dev/stdout", "is an open descriptor"),
        ("link", "is an open descriptor"),
        ("new/", "names a folder"),
    ],
)
def test_an_output_that_is_no_file_of_its_own_is_refused(folder: Path, output: str, says: str) -> None:
    """A descriptor, by whatever name, and a folder are refused before anything is made."""
    (folder / "link").symlink_to("/dev/fd/1")
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match=says):
        FileLedger(f"{folder}/{output}" if output[0] != "/" else output).check_paths()
    assert sorted(folder.iterdir()) == before


def test_an_input_that_can_not_be_a_path_is_refused(folder: Path) -> None:
    """By the source, which says what it is; nothing is left behind."""
    with pytest.raises(UsageError, match="can not be read: ValueError: embedded null byte"):
        run(run_resumable(Worker(), "a\0b", output=folder / "out"))
    assert names_in(folder) == set()


@pytest.mark.parametrize(("name", "hint"), [("out.jsonl.gz", "`gzip out.jsonl`"), ("out.json.ZST", "`zstd out.json`")])
def test_a_compressed_output_is_refused_with_a_hint(name: str, hint: str) -> None:
    """The message says which name to give instead, and how to compress what is complete."""
    with pytest.raises(UsageError, match=hint):
        FileLedger(name)


def test_an_output_or_a_checkpoint_is_required() -> None:
    """Neither: a usage error that says what is missing."""
    with pytest.raises(UsageError, match="without an output, checkpoint= is required"):
        FileLedger(None)


@pytest.mark.parametrize("kind", ["nfs4", "ext4"])
def test_a_network_file_system_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Whether locks and fsync hold there is not known, and the log says so."""
    monkeypatch.setattr(file_ledger, "_file_system", lambda _: kind)
    ends(Worker(), folder)
    assert ("lies on a network file system (nfs4)" in caplog.text) == (kind == "nfs4")


@pytest.mark.parametrize("mounts", [None, "one word\n"])
def test_where_the_mounts_can_not_be_read_nothing_is_known_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, mounts: str | None
) -> None:
    """On another system, or with a line of another form: no warning, and no error."""

    def opened(*_: object, **__: object) -> io.StringIO:
        if mounts is None:
            raise FileNotFoundError("/proc/self/mounts")
        return io.StringIO(mounts)

    monkeypatch.setattr(file_ledger, "open", opened, raising=False)
    assert file_ledger._file_system("/tmp") is None


def test_the_file_system_of_a_folder_is_known() -> None:
    """The longest mount point that the folder lies on counts."""
    assert file_ledger._file_system("/proc/self") == "proc"
    assert file_ledger._file_system("relative") is None


async def test_a_checkpoint_that_may_not_be_opened_is_no_failed_storage(folder: Path) -> None:
    """Permission is the user's to mend: `UsageError`, which names the file."""
    await (await begun(FileLedger(folder / "out"))).close()
    steps = FaultyFiles()
    ledger = FileLedger(folder / "out", files=steps)
    await ledger.open(JOB)
    await ledger.close()
    opens = [number for number, call in enumerate(steps.calls) if call == "open"]
    ledger = FileLedger(folder / "out", files=FaultyFiles(opens[1], errno.EACCES))  # after that of the folder
    with pytest.raises(UsageError, match=r"out\.checkpoint can not be used: Permission denied"):
        await ledger.open(JOB)
    await ledger.close()


def test_a_machine_that_does_not_tell_its_mounts_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without such a file, or with one that can not be understood, nothing is known, and nothing fails."""
    for error in (FileNotFoundError, ValueError):
        monkeypatch.setattr(file_ledger, "open", mock.Mock(side_effect=error), raising=False)
        assert file_ledger._file_system("/proc/self") is None


# Without an output


def test_without_an_output_the_journal_holds_no_records(folder: Path) -> None:
    """Ahead lines hold indices and CRCs alone; the job resumes and ends like any other, and leaves nothing."""
    journal = folder / "journal"
    with pytest.raises(ItemFailed):
        ends(Worker(hangs={NAMES[0]}, fails={NAMES[5]}), folder, output=None, checkpoint=journal)
    replay = replay_of(journal)
    assert replay.ahead
    assert all(item.record is None for item in replay.ahead.values())
    assert replay.state is not None
    assert replay.state.output is None
    assert b"did" not in journal.read_bytes()
    assert names_in(folder) == {"journal"}
    done = committed(journal)
    worker = Worker()
    summary = ends(worker, folder, output=None, checkpoint=journal)
    assert (summary.total_items, summary.executed, summary.output) == (9, 9 - len(done), None)
    assert sorted(worker.calls) == [name for index, name in enumerate(NAMES) if index not in done]
    assert names_in(folder) == set()


def test_without_an_output_a_result_need_not_be_json(folder: Path) -> None:
    """Only side effects: whatever the worker returns is dropped; a kept checkpoint gives the summary again."""

    async def side_effect(item: str) -> object:
        return object()

    async def main() -> RunSummary:
        return await run_resumable(side_effect, NAMES, checkpoint=folder / "journal", keep_checkpoint=True)

    assert run(main()).executed == 9
    assert run(main()).executed == 0


# The journal's size


class Measured(Files):
    """Tells the largest size of each file that was made durable, and how much was written in all."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self.largest = self.renames = self.written = 0

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self._is_journal(descriptor):
            self.written += len(data)
        return super().pwrite(descriptor, data, offset)

    def fdatasync(self, descriptor: int) -> None:
        super().fdatasync(descriptor)
        if self._is_journal(descriptor):
            self.largest = max(self.largest, self.stat(descriptor).st_size)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.renames += target == self._path

    def _is_journal(self, descriptor: int) -> bool:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(Path(self._path).name)


def test_a_long_run_with_stragglers_keeps_its_journal_bounded_and_its_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dead is dropped in time, the mode bits are kept whatever the umask, and the output is right."""
    monkeypatch.setattr(checkpoint, "COMPACT_ABOVE_DEAD_BYTES", 5_000)
    names = [f"item {number}" for number in range(400)]
    slow = dict.fromkeys(names[::20], 6.0)
    journal = folder / "out.jsonl.checkpoint"
    files = Measured(journal)
    worker = Worker(slow=slow, fails={names[300]}, during={names[1]: lambda: journal.chmod(0o664)})
    with pytest.raises(ItemFailed):
        ends(worker, folder, files=files, names=names, batch_size=2)
    assert stat.S_IMODE(journal.stat().st_mode) == 0o664
    assert files.renames > 5
    assert files.written > 50_000
    assert files.largest < 12_000
    done = committed(journal)
    assert len(done) >= 290
    again = Worker(slow=slow)
    assert ends(again, folder, files=files, names=names, batch_size=2).executed == 400 - len(done)
    assert not {names[index] for index in done} & set(again.calls)
    assert (folder / "out.jsonl").read_bytes() == json_lines(names)
    assert files.largest < 12_000


async def test_what_is_ahead_survives_every_compaction(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compacted journal holds all that is still ahead of the new mark, and none of what the mark has passed."""
    monkeypatch.setattr(checkpoint, "COMPACT_ABOVE_DEAD_BYTES", 0)
    ledger = await begun(FileLedger(folder / "out"))
    expected = {}
    for number in range(30):
        mark = 1 + 3 * number
        ahead = [Ahead(mark + 5, number, b'{"index":%d}' % (mark + 5)), Ahead(1000 + number, number, b"[%d]" % number)]
        await ledger.commit(commit(mark, 0 if number == 0 else 3, generation=3 + number, ahead=ahead))
        expected.update({item.index: item for item in ahead})
        expected = {index: item for index, item in expected.items() if index >= mark}
        replay = replay_of(folder / "out.checkpoint")
        assert replay.ahead == dict(sorted(expected.items()))
        assert replay.state is not None
        assert (replay.state.mark, replay.state.generation) == (mark, 3 + number)
    await ledger.close()
    assert (folder / "out.checkpoint").stat().st_size < 5_000


async def test_what_was_spent_survives_every_compaction(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of items that are not finished, and of no others; also over the death of the process."""
    monkeypatch.setattr(checkpoint, "COMPACT_ABOVE_DEAD_BYTES", 0)
    ledger = await begun(FileLedger(folder / "out"))
    expected: dict[int, Spent] = {}
    for number in range(30):
        mark = 1 + 3 * number
        spent = [Spent(mark + 7, number % 3), Spent(500, number), Spent(900 + number, 0, 1)]
        ahead = [Ahead(900 + number - 1, number, b"[1]")] if number else []
        taken = commit(mark, 0 if number == 0 else 3, generation=3 + number, ahead=ahead)
        await ledger.commit(msgspec.structs.replace(taken, spent=spent))
        expected.update({item.index: item for item in spent})
        expected.pop(900 + number - 1, None)
        expected = {i: item for i, item in expected.items() if i >= mark and (item.attempts or item.starts)}
        assert replay_of(folder / "out.checkpoint").spent == expected
        if number == 15:
            await ledger.close()
            ledger = FileLedger(folder / "out")
            assert (await ledger.open(JOB)).spent == expected
    await ledger.close()
    assert (folder / "out.checkpoint").stat().st_size < 8_000


def test_a_journal_keeps_its_mode_when_a_job_starts_anew(folder: Path) -> None:
    """A fresh run replaces an old journal and a kept one replaces a live one: the mode bits stay."""
    journal = folder / "out.jsonl.checkpoint"
    with pytest.raises(ItemFailed):
        ends(Worker(fails={NAMES[4]}), folder)
    for mode in (0o600, 0o666):
        journal.chmod(mode)
        ends(Worker(), folder, fresh=True, keep_checkpoint=True)
        assert stat.S_IMODE(journal.stat().st_mode) == mode


def test_a_disk_that_takes_three_bytes_at_a_time_gets_all_of_them(folder: Path) -> None:
    """Short writes are gone on with, in the output and in the journal."""
    with pytest.raises(ItemFailed):
        ends(Worker(hangs={NAMES[0]}, fails={NAMES[6]}), folder, files=ShortWrites())
    assert committed(folder / "out.jsonl.checkpoint") == {1, 2, 3, 4, 5}
    ends(Worker(), folder, files=ShortWrites())
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


# Every step fails, or is the last


class Scenario(NamedTuple):
    """A job, what it finds, and how it is run."""

    prepare: Callable[[Path], None] = lambda folder: None
    options: dict[str, Any] = {}  # noqa: RUF012  never changed
    output: str = "out.jsonl"
    compacting: bool = False


def array(names: list[str]) -> bytes:
    return b"[\n" + b",\n".join(json_lines(names).splitlines()) + b"\n]\n"


def interrupted(folder: Path, **options: Any) -> None:
    with pytest.raises(ItemFailed):
        ends(Worker(hangs={NAMES[1]}, fails={NAMES[5]}), folder, **options)


def interrupted_with_garbage(folder: Path) -> None:
    interrupted(folder)
    for name in ("out.jsonl.partial", "out.jsonl.checkpoint"):
        with (folder / name).open("ab") as file:
            file.write(b"garbage" * 1000)  # more than is still to be written


def damaged(folder: Path) -> None:
    interrupted(folder)
    (folder / "out.jsonl.checkpoint").write_bytes(b"damaged")


def complete_but_not_published(folder: Path, *, renamed: bool = False) -> None:
    """What a kill leaves after the complete line, or after the rename."""
    steps = FaultyFiles()
    ends(Worker(), folder, files=steps)
    at = len(steps.calls) - 1 - steps.calls[::-1].index("rename") + renamed
    (folder / "out.jsonl").unlink()
    with pytest.raises(StorageFailed):
        ends(Worker(), folder, files=FaultyFiles(at, dies=True))
    assert replay_of(folder / "out.jsonl.checkpoint").complete is not None


def kept(folder: Path) -> None:
    ends(Worker(), folder, keep_checkpoint=True)


SCENARIOS = {
    "fresh": Scenario(),
    "fresh, array": Scenario(output="out.json"),
    "fresh, keep_checkpoint": Scenario(options={"keep_checkpoint": True}),
    "fresh, compacting at each commit": Scenario(compacting=True),
    "resumed": Scenario(interrupted_with_garbage),
    "fresh=True over an old run": Scenario(interrupted, {"fresh": True}),
    "damaged": Scenario(damaged),
    "complete, not published": Scenario(complete_but_not_published),
    "complete, renamed": Scenario(lambda folder: complete_but_not_published(folder, renamed=True)),
    "complete, keep_checkpoint": Scenario(complete_but_not_published, {"keep_checkpoint": True}),
    "kept, started anew": Scenario(kept),
}
every_scenario = pytest.mark.parametrize("name", SCENARIOS)


class World:
    """One scenario, prepared once and copied for each life."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scenario = SCENARIOS[name]
        self._prepared, self.place = folder / "prepared", folder / "place"
        self._prepared.mkdir()
        self.scenario.prepare(self._prepared)
        if self.scenario.compacting:
            monkeypatch.setattr(journal_module, "worth_compacting", lambda size, live: True)
        self.expected = (array if self.scenario.output == "out.json" else json_lines)(NAMES)

    @property
    def output(self) -> Path:
        return self.place / self.scenario.output

    @property
    def journal(self) -> Path:
        return self.place / f"{self.scenario.output}.checkpoint"

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._prepared, self.place)

    def life(self, worker: Worker, files: Files, **options: Any) -> RunSummary:
        # Items in an order that leaves some of them ahead of the mark at nearly every commit.
        slow = {NAMES[0]: 1.5, NAMES[1]: 3.2, NAMES[4]: 2.5}
        worker._slow = slow
        return ends(worker, self.place, files=files, output=self.scenario.output, batch_size=2, **options)

    def fails(self, files: FaultyFiles, match: str = "") -> bool:
        """Whether a life over this seam fails, as it should then."""
        try:
            self.life(Worker(), files, **self.scenario.options)
        except StorageFailed as error:
            return match in str(error)
        return False

    def count(self) -> list[str]:
        """The operations of a life without a fault."""
        self.reset()
        steps = FaultyFiles()
        self.life(Worker(), steps, **self.scenario.options)
        assert self.output.read_bytes() == self.expected
        return steps.calls

    def next_life(self) -> None:
        """The same line again: the right bytes, and nothing that was committed is done again."""
        done = committed(self.journal)
        complete = self.journal.exists() and replay_of(self.journal).complete is not None
        options = self.scenario.options
        if options.get("fresh"):
            options = {}  # the user asked for it once
        elif complete:
            options = {**options, "keep_checkpoint": True}  # a kept line says complete only with it
        worker = Worker()
        summary = self.life(worker, DISK, **options)
        assert self.output.read_bytes() == self.expected
        assert not {NAMES[index] for index in done} & set(worker.calls)
        assert summary.executed == len(worker.calls) == len(NAMES) - len(done)
        assert summary.executed == 0 or not complete
        left = {name for name in names_in(self.place) if ".damaged-" not in name}
        assert left - {f"{self.journal.name}.tmp"} == {self.output.name} | (
            {self.journal.name} if options.get("keep_checkpoint") else set()
        )
        if self.scenario.prepare is damaged:  # moved aside, never deleted
            for kind in ("checkpoint", "partial"):
                moved = (self.place / f"out.jsonl.{kind}.damaged-1").read_bytes()
                assert moved == (self._prepared / f"out.jsonl.{kind}").read_bytes()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@every_scenario
def test_any_operation_that_fails_is_the_last_but_for_closing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    """`StorageFailed`, not one more byte, fsync, rename or cut; then the same line ends the job as it should be."""
    world = World(name, folder, monkeypatch)
    operations = world.count()
    for at, operation in enumerate(operations):
        world.reset()
        files = FaultyFiles(at, error, torn=error == errno.ENOSPC)
        if not world.fails(files, os.strerror(error)):
            assert operation == "close", (at, operation)
            assert world.output.read_bytes() == world.expected
            continue
        allowed = READING if world.scenario.prepare is interrupted_with_garbage else {"close"}  # an audit may read on
        assert set(files.calls_after_failure) <= allowed, (at, operation, files.calls_after_failure)
        assert not [left for left in names_in(world.place) if left.endswith(".lock")], (at, operation)
        world.next_life()


@pytest.mark.parametrize("torn", [False, True])
@every_scenario
def test_a_process_that_dies_between_any_two_steps_is_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, torn: bool
) -> None:
    """The same line again gives the right bytes; once the `complete` line is durable, it runs nothing."""
    world = World(name, folder, monkeypatch)
    operations = world.count()
    complete = 0
    for at, operation in enumerate(operations):
        if torn and operation != "pwrite":
            continue
        world.reset()
        assert world.fails(FaultyFiles(at, dies=True, torn=torn)) or operation == "close", (at, operation)
        Path(f"{world.output}.lock").write_bytes(b"left by the dead")
        complete += world.journal.exists() and replay_of(world.journal).complete is not None
        world.next_life()
    assert complete > 0 or torn


def test_a_process_that_dies_twice_is_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the second life ends at any step of reading, cutting back and going on."""
    world = World("fresh", folder, monkeypatch)
    operations = world.count()
    for first in range(9, len(operations) - 2, 4):
        second = 0
        while True:
            world.reset()
            with pytest.raises(StorageFailed):
                world.life(Worker(), FaultyFiles(first, dies=True, torn=True))
            done = committed(world.journal)
            if not world.fails(FaultyFiles(second, dies=True)):
                break
            assert committed(world.journal) >= done or not world.journal.exists()
            world.next_life()
            second += 1


async def test_a_start_cuts_output_and_journal_back_to_the_last_commit(folder: Path) -> None:
    """Whatever stands after the last state line is gone, durably, when a ledger is open."""
    await (await begun(FileLedger(folder / "out"))).close()
    before = snapshot(folder)
    (folder / "out.partial").write_bytes((folder / "out.partial").read_bytes() + b'{"index":1}\n')
    ahead = b"".join(checkpoint.encode_ahead([Ahead(5, 5, b"[5]")]))  # intact, but no state line follows
    (folder / "out.checkpoint").write_bytes((folder / "out.checkpoint").read_bytes() + ahead + b"torn")
    files = FaultyFiles()
    ledger = FileLedger(folder / "out", files=files)
    assert (await ledger.open(JOB)).ahead == {}
    await ledger.close()
    assert snapshot(folder) == before
    assert files.calls == [
        *["open", "fsync", "close"],  # the folder: what is seen there is durable from here on
        "lstat",  # the partial output is locked at once
        "lstat",  # no retry of the output's failed items is unfinished
        *["open", "fsync", "drop_cache", "stat", "pread"],  # the journal, from the disk and not from the cache
        *["open", "fsync", "drop_cache", "stat", "pread"],  # the partial output
        *["stat", "truncate", "fsync", "truncate", "fsync"],
        *["close", "close"],
    ]


async def test_a_job_of_which_nothing_is_done_leaves_nothing(folder: Path) -> None:
    """Neither journal nor partial output nor folders stay of a job that has committed no item; a resume is no other."""
    for _ in range(2):
        ledger = FileLedger(folder / "a" / "out", folder / "b" / "journal")
        await ledger.open(JOB)
        await ledger.commit(commit(0))
        assert (folder / "a" / "out.partial").exists()
        await ledger.close()
        assert names_in(folder) == set()


async def test_a_job_without_an_output_of_which_nothing_is_done_leaves_nothing(folder: Path) -> None:
    """Its checkpoint goes as well."""
    ledger = FileLedger(None, folder / "journal")
    await ledger.open(Job("iterable", "tests:worker", None, "none"))
    await ledger.commit(commit(0))
    await ledger.close()
    assert names_in(folder) == set()


async def test_what_can_not_be_removed_is_only_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job of which nothing is done may leave its files where it can not do otherwise: the next run resumes it."""
    steps = FaultyFiles()
    ledger = FileLedger(folder / "out", files=steps)
    await ledger.open(JOB)
    await ledger.commit(commit(0))
    at = len(steps.calls)
    await ledger.close()
    ledger = FileLedger(folder / "out", files=FaultyFiles(at, errno.EACCES))
    await ledger.open(JOB)
    await ledger.commit(commit(0))
    await ledger.close()
    assert "out.checkpoint can not be removed: PermissionError" in caplog.text
    assert names_in(folder) == {"out.partial", "out.checkpoint"}


def test_a_damaged_checkpoint_without_an_output_is_moved_aside(folder: Path) -> None:
    """There is no output to move: the checkpoint alone is kept."""
    (folder / "journal").write_bytes(b"no line of this\n")
    ends(Worker(), folder, output=None, checkpoint=folder / "journal")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"journal.damaged-1": b"no line of this\n"}


async def test_a_damaged_journal_is_never_removed(folder: Path) -> None:
    """Nothing is done as far as can be read, but there were lines that can not be: their bytes stay."""
    ledger = FileLedger(folder / "out")
    await ledger.open(JOB)
    await ledger.commit(commit(0))
    await ledger.commit(commit(0, generation=2, ahead=[Ahead(3, 3, b'{"index":3}')]))
    await ledger.close()
    journal = folder / "out.checkpoint"
    journal.write_bytes(journal.read_bytes().replace(b'"index":3', b'"INDEX":3'))
    damaged = journal.read_bytes()
    ledger = FileLedger(folder / "out")
    found = await ledger.open(JOB)
    assert found.state is not None
    assert (found.state.generation, found.ahead) == (2, {})
    await ledger.close()
    assert journal.read_bytes() == damaged


async def test_a_poisoned_ledger_refuses_everything_but_closing(folder: Path) -> None:
    """After a failure every call raises the same error, and nothing is written."""
    steps = FaultyFiles()
    await (await begun(FileLedger(folder / "count", files=steps))).close()
    files = FaultyFiles(len(steps.calls) - 2)  # the first operation of the next commit
    ledger = await begun(FileLedger(folder / "out", files=files))
    with pytest.raises(StorageFailed) as first:
        await ledger.commit(commit(2, 1, generation=3))
    for attempt in (
        ledger.commit(commit(2, 1, generation=3)),
        ledger.finish(Bookmark(None, 0, 0), RunSummary(1, 1, True, 0, 1, 0, 0.0, None)),  # noqa: FBT003
    ):
        with pytest.raises(StorageFailed) as again:
            await attempt
        assert again.value is first.value
    await ledger.show(progress())
    await ledger.close()
    assert files.calls_after_failure == ["close", "close"]
    assert f"the storage failed: {folder}/out.partial: " in str(first.value)
    assert "up to the mark 1 and ahead of it, is safe" in str(first.value)
    assert "errno 5" in str(first.value)


@pytest.mark.parametrize(("fsync", "path"), [(1, "out.partial"), (3, "out.checkpoint")])
async def test_failed_storage_names_its_file(folder: Path, fsync: int, path: str) -> None:
    """A call on a descriptor fails without a name: the message has it all the same."""
    steps = FaultyFiles()
    await (await begun(FileLedger(folder / "count", files=steps))).close()
    files = FaultyFiles(len(steps.calls) - 2 + fsync)
    ledger = await begun(FileLedger(folder / "out", files=files))
    with pytest.raises(StorageFailed, match=f"{folder}/{path}: "):
        await ledger.commit(commit(2, 1, generation=3))
    await ledger.close()


@pytest.mark.parametrize("again", [False, True])
def test_failed_storage_names_a_path_whatever_fails(folder: Path, again: bool) -> None:
    """A call on a folder's descriptor, and one on the output of a job that was complete, as well."""
    steps, nameless = FaultyFiles(), []
    for number in itertools.count():
        place = folder / str(number)
        place.mkdir()
        if again:
            ends(Worker(), place, keep_checkpoint=True)
        files = FaultyFiles(number) if number else steps
        try:
            ends(Worker(), place, files=files, keep_checkpoint=True)
        except StorageFailed as error:
            by_name = files.calls[number] in {"open", "lstat", "rename", "unlink"}  # the real ones name it themselves
            if not by_name and f"the storage failed: {place}" not in str(error):
                nameless.append(files.calls[number])
        if number == len(steps.calls):
            break
    assert nameless == []
    assert number > (8 if again else 30)


async def test_an_audit_that_finds_a_change_poisons_the_ledger(folder: Path) -> None:
    """After `OutputChanged` out of the audit, later commits and the finish fail with it as well."""
    await (await begun(FileLedger(folder / "out"))).close()
    ledger = FileLedger(folder / "out")
    assert (await ledger.open(JOB)).state is not None
    await ledger.audit()
    (folder / "out.partial").write_bytes(b'{"index":1}\n')
    with pytest.raises(OutputChanged) as first:
        await ledger.audit()
    with pytest.raises(OutputChanged) as again:
        await ledger.commit(commit(2, 1, generation=3))
    assert again.value is first.value
    await ledger.close()


async def test_an_audit_notices_an_output_that_was_cut(folder: Path) -> None:
    """It ends before the point that was resumed: `OutputChanged`, as for other bytes."""
    await (await begun(FileLedger(folder / "out"))).close()
    ledger = FileLedger(folder / "out")
    await ledger.open(JOB)
    os.truncate(folder / "out.partial", 3)
    with pytest.raises(OutputChanged, match=r"the first 12 bytes of .*out\.partial"):
        await ledger.audit()
    await ledger.close()


async def test_a_disk_that_can_not_be_read_fails_the_start(folder: Path) -> None:
    """A read error at the start is `StorageFailed`, which can not say how far the job had come."""
    await (await begun(FileLedger(folder / "out"))).close()
    steps = FaultyFiles()
    ledger = FileLedger(folder / "out", files=steps)
    await ledger.open(JOB)
    await ledger.close()
    before = snapshot(folder)
    ledger = FileLedger(folder / "out", files=FaultyFiles(steps.calls.index("pread")))
    with pytest.raises(StorageFailed, match=r"out\.checkpoint: .* all that was committed is safe"):
        await ledger.open(JOB)
    await ledger.close()
    assert snapshot(folder) == before


async def test_a_file_system_that_turns_read_only_is_a_failure_of_the_storage(folder: Path) -> None:
    """Once the lock could be made there, "read-only" is no mistake in the command: ext4 turns so when it fails."""
    ledger = FileLedger(folder / "out", files=FaultyFiles(0, errno.EROFS))
    with pytest.raises(StorageFailed, match="Read-only file system"):
        await ledger.open(JOB)
    await ledger.close()


async def test_a_disk_that_can_not_be_read_fails_the_audit(folder: Path) -> None:
    """A read error is `StorageFailed`, and poisons the ledger."""
    await (await begun(FileLedger(folder / "out"))).close()
    steps = FaultyFiles()
    ledger = FileLedger(folder / "out", files=steps)
    await ledger.open(JOB)
    at = len(steps.calls)
    await ledger.close()
    ledger = FileLedger(folder / "out", files=FaultyFiles(at))
    await ledger.open(JOB)
    with pytest.raises(StorageFailed, match="Input/output error"):
        await ledger.audit()
    with pytest.raises(StorageFailed):
        await ledger.commit(commit(2, 1, generation=3))
    await ledger.close()


def test_the_durable_path_does_its_steps_in_order(folder: Path) -> None:
    """Journal first, then the partial output; in a commit the output before the journal; at the end as written."""
    files = FaultyFiles()
    ends(Worker(), folder, files=files, names=NAMES[:1], keep_checkpoint=True)
    directory = ["open", "fsync", "close"]
    append = ["pwrite", "fdatasync", "pread"]  # the read tells whether the file system still lives
    replace = ["lstat", "open", "pwrite", "fsync", "rename", *directory, "fsync"]
    assert files.calls == [
        *directory,  # what is seen there is durable from here on
        *["lstat", "lstat"],  # no partial output that another run may hold, and no unfinished retry
        *["open", "lstat"],  # no journal, and no partial output without one
        *replace,  # 1. the journal with the mark 0
        *["lstat", "open", "truncate", "fsync", *directory],  # the partial output
        *append,  # a commit: the records
        *append,  # then the state line
        *["stat", "lstat", "pread"],  # 2. verified
        *append,  # 3. complete
        *["rename", *directory],  # 4. published
        *["lstat", "open", "stat", "pwrite", "fsync", "rename", *directory, "fsync", "close"],  # 5. kept
        *["close", "close"],
    ]


def test_a_rename_is_durable_before_the_journal_goes(folder: Path) -> None:
    """A run that finds the output renamed already can not know that its folder was synced: it does so first."""

    class Log(Files):
        def __init__(self) -> None:
            self.steps: list[tuple[str, str]] = []

        def fsync_directory(self, path: str) -> None:
            super().fsync_directory(path)
            self.steps.append(("fsync", path))

        def unlink(self, path: str) -> None:
            super().unlink(path)
            self.steps.append(("unlink", path))

    (folder / "far").mkdir()
    far: dict[str, Any] = {"checkpoint": folder / "far" / "journal"}
    steps = FaultyFiles()
    ends(Worker(), folder, files=steps, **far)
    renamed = len(steps.calls) - 1 - steps.calls[::-1].index("rename")
    (folder / "out.jsonl").unlink()
    with pytest.raises(StorageFailed):
        ends(Worker(), folder, files=FaultyFiles(renamed + 1, dies=True), **far)
    assert names_in(folder) == {"out.jsonl", "far"}
    log = Log()
    assert ends(Worker(), folder, files=log, **far).executed == 0
    assert log.steps[:2] == [("fsync", str(folder)), ("fsync", str(folder / "far"))]
    assert log.steps[2:] == [("unlink", str(far["checkpoint"])), ("fsync", str(folder / "far"))]


def test_a_bind_mounted_output_is_explained(folder: Path) -> None:
    """EBUSY at the rename says what it means."""

    class Busy(Files):
        def rename(self, source: str, target: str) -> None:
            if target.endswith("out.jsonl"):
                raise OSError(errno.EBUSY, "Device or resource busy", source, None, target)
            super().rename(source, target)

    with pytest.raises(StorageFailed, match=r"a mount point of its own .*mount its folder instead"):
        ends(Worker(), folder, files=Busy())
    worker = Worker()
    assert ends(worker, folder).executed == 0
    assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)


def test_a_complete_line_holds_the_job_the_input_to_its_end_and_the_output(folder: Path) -> None:
    """What a later start needs to publish, or to compare, is in the kept line."""
    ends(Worker(), folder, keep_checkpoint=True)
    complete = replay_of(folder / "out.jsonl.checkpoint").complete
    assert isinstance(complete, Complete)
    assert (complete.size, complete.summary["total_items"]) == (len(json_lines(NAMES)), 9)
    assert complete.job.source == "iterable"
    assert complete.source.items_crc != 0
