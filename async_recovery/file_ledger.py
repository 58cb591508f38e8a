"""The default ledger: an output file, and beside it its journal and its lock.

A commit, all of it in one job of the writer thread, so that no cancellation can fall into it:

1. The records are appended to the partial output, then fdatasync.
2. The ahead lines and the state line are appended to the journal, then fdatasync. The state line has the CRC of
   all the output up to its offset: the journal alone says what counts.
3. Only now is the commit acknowledged.

Any OSError poisons the ledger: not one more byte is written by this process, since after a failed fsync the cache
and the disk may differ. A restart resumes from the last state line that is really there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import anyio.to_thread
import msgspec

from .checkpoint import (
    FORMAT,
    Ahead,
    Bookmark,
    Checkpoint,
    Commit,
    Complete,
    Job,
    OutputState,
    Replay,
    State,
    printable,
)
from .compressed import SUFFIXES, suffix_of
from .contracts import RunSummary
from .errors import (
    AsyncRecoveryError,
    CheckpointUnusable,
    JobMismatch,
    Mismatch,
    OutputChanged,
    StorageFailed,
    UsageError,
    describe,
    shorten,
    storage_failed,
)
from .files import DISK, Files, WriterThread, is_descriptor
from .journal import Journal
from .lock import Lock
from .output_file import Framing, OutputFile, framing_of, move_aside
from .progress import Progress
from .records import read_failure
from .workers import words_for

logger = logging.getLogger("async_recovery.ledger")

T = TypeVar("T")

NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
DISK_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
NAME_BYTES = 255
AUDIT_BYTES = 16 << 20

NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs"}


class FileLedger:
    """Records in a file, progress in a journal beside it.

    :param output: the finished output's path; None if only the progress is to be remembered.
    :param checkpoint: the journal's path; None: ``<output>.checkpoint``. Required without an output.
    :param input: the input's path, for people, and to see that it is none of the files written here.
    :param fresh: start anew, whatever is there.
    :param keep_checkpoint: leave the journal's complete line behind when the job is done.
    :param on_damage: a journal with nothing readable: ``"restart"`` moves it aside, ``"refuse"`` raises.
    :param keep_records: without an output, remember the records that are ahead of the mark: someone else takes them.
    :param files: the file operations.
    :raises UsageError: if neither output nor checkpoint is given, or an argument can not be used.

    :ivar committed_bytes: how much of the partial output the last commit vouches for, to be read at any time; None
        while that is not known.
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        input: str | None = None,
        fresh: bool = False,
        keep_checkpoint: bool = False,
        on_damage: Literal["restart", "refuse"] = "restart",
        keep_records: bool = False,
        files: Files = DISK,
    ) -> None:
        if output is None and checkpoint is None:
            raise UsageError("without an output, checkpoint= is required: it is all that remembers the job")
        if on_damage not in ("restart", "refuse"):
            raise UsageError(f"on_damage is {on_damage!r}: it must be 'restart' or 'refuse'")
        self.output = None if output is None else _path("output", output)
        if self.output is not None and (suffix := suffix_of(self.output)):
            plain = shlex.quote(self.output.removesuffix(suffix))
            raise UsageError(
                f"the output {self.output} would have to be compressed, and is written plain: name it {plain}, and "
                f"compress it when it is complete: `{SUFFIXES[suffix.lower()]} {plain}`"
            )
        self._given_checkpoint = None if checkpoint is None else _path("checkpoint", checkpoint)
        self._input = None if input is None or "\0" in input else input  # the source says that there is no such file
        self._shown_input = None if input is None else printable(input)
        self._fresh = fresh
        self.keeps_checkpoint = keep_checkpoint
        self._on_damage = on_damage
        self._files = files
        self._thread = WriterThread()
        self._poison: AsyncRecoveryError | None = None
        self._durable_mark: int | None = None
        self.committed_bytes: int | None = None
        self._begun = False
        self._nothing_done = False
        self._damaged = False
        self._made_folders: list[str] = []
        self._locks: list[Lock] = []
        self._file: OutputFile | None = None
        self._opened_journal: Journal | None = None
        self._job: Job
        self._closed = False
        self._framing = Framing() if self.output is None else framing_of(self.output)
        without_output = "records" if keep_records else "none"
        self.form = without_output if self.output is None else self._framing.form

    async def open(self, job: Job) -> Checkpoint:
        """See `Ledger.open`."""
        self._job = job
        try:
            return await self._thread.run(self._open)
        except OSError as error:
            if error.errno in NOT_ALLOWED:
                raise UsageError(
                    f"{error.filename} can not be used: {error.strerror}. Mend that, or name another file"
                ) from error
            raise self._failed(error) from error

    async def audit(self) -> None:
        """See `Ledger.audit`: the output before the point that was resumed, 16 MiB at a time."""
        if self._file is None:
            return
        resumed, offset, crc = self._file.resumed, 0, 0
        while offset < resumed.offset:
            end = min(offset + AUDIT_BYTES, resumed.offset)
            try:
                found = await anyio.to_thread.run_sync(self._file.crc_of, offset, end, crc)
            except OSError as error:
                raise self._failed(error) from error
            if found is None:
                break
            offset, crc = end, found
        if (offset, crc) != (resumed.offset, resumed.crc):
            self._poison = OutputChanged(
                f"the first {resumed.offset} bytes of {self._file.partial} are not those that were written: "
                "restore them to resume, or start anew with --fresh (fresh=True)"
            )
            raise self._poison

    async def commit(self, commit: Commit) -> None:
        """See `Ledger.commit`."""
        await self._on_thread(lambda: self._commit(commit))

    async def show(self, progress: Progress) -> None:
        """See `Ledger.show`: in the lock's file."""
        note = msgspec.to_builtins(progress)
        await self._thread.run(self._show, note)

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """See `Ledger.finish`."""
        await self._on_thread(lambda: self._finish(bookmark, summary))

    async def close(self) -> None:
        """See `Ledger.close`."""
        if not self._closed:
            self._closed = True
            await self._thread.run(self._close)
            self._thread.stop()

    async def _on_thread(self, job: Callable[[], T]) -> T:
        if self._poison is not None:
            raise self._poison
        try:
            return await self._thread.run(job)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageFailed:
        """From here on nothing is written any more."""
        at = f"{error.filename}: " if error.filename else ""
        what = f"{at}{error.strerror or error} (errno {error.errno})"
        self._poison = failure = storage_failed(what, self._durable_mark)
        return failure

    @property
    def _journal(self) -> Journal:
        assert self._opened_journal is not None
        return self._opened_journal

    # What follows runs on the writer thread.

    def _open(self) -> Checkpoint:
        output, journal = self.check_paths()
        try:
            self._make_folder(os.path.dirname(output or journal))
            self._make_folder(os.path.dirname(journal))
            for path in self._lock_paths(output, journal):
                lock = Lock(path)
                lock.acquire()
                self._locks.append(lock)
        except OSError as error:
            if error.errno in DISK_FAILED:
                raise
            raise UsageError(f"the folder of {output or journal} can not be written to: {describe(error)}") from error
        _warn_of_network(output or journal)
        for folder in dict.fromkeys(os.path.dirname(path) for path in (output, journal) if path is not None):
            self._files.fsync_directory(folder)  # what a killed run renamed there is seen, but may not be durable yet
        self._file = None if output is None else OutputFile(output, self._framing, self._files)
        if self._file is not None:
            self._file.claim()
        self._opened_journal = Journal(journal, self._files)
        self._look_around(output)
        return Checkpoint() if self._fresh else self._decide(self._journal.load())

    def _left_in(self, path: str) -> tuple[Journal, Replay]:
        """Another journal than the job's own, read and closed again."""
        journal = Journal(path, self._files)
        try:
            return journal, journal.load()
        finally:
            journal.close()

    def _look_around(self, output: str | None) -> None:
        """Refuse to write an output that an unfinished retry of its failed items would replace."""
        if output is None or self._files.lstat(retry_of(output) + ".checkpoint") is None:
            return
        journal, replay = self._left_in(retry_of(output) + ".checkpoint")
        found = replay.complete or replay.state
        raise Mismatch(
            f"the failed items of {output} are being run again, and that is not finished ({journal.path}). To finish "
            f"it: `{command_line('retry-failed', output, job=found.job if found else None)}`. To drop it instead, "
            f"remove the files {retry_of(output)}.*"
        )

    def _lock_paths(self, output: str | None, journal: str) -> list[str]:
        paths = [] if output is None else [output + ".lock"]
        if self._given_checkpoint is not None:
            paths.append(journal + ".lock")
            if journal.endswith(".checkpoint"):  # it may be the default checkpoint of a job that has only that lock
                paths.append(journal.removesuffix(".checkpoint") + ".lock")
        return list(dict.fromkeys(paths))

    def _decide(self, replay: Replay) -> Checkpoint:
        """What to do with what is there; changes nothing but garbage after the last commit."""
        found = replay.complete or replay.state
        if not self._journal.exists:
            self._refuse_lone_partial()
            return Checkpoint()
        if found is None:
            self._damaged = True
            message = f"the checkpoint {self._journal.path} is damaged: not one line of it can be read"
            if self._on_damage == "refuse":
                raise CheckpointUnusable(f"{message}. Restore it, or start anew with --fresh (fresh=True)")
            logger.warning("%s; it and the partial output are moved aside, and the job starts anew", message)
            return Checkpoint()
        self._refuse_other_job(found.job)
        if replay.complete is not None:
            return self._already_complete(replay.complete, kept=replay.kept)
        assert replay.state is not None
        if self._file is not None:
            self._file.resume(replay.state.output or OutputState(0, 0, (0, 0)))
            self._file.cut()
            self.committed_bytes = self._file.state.offset
        self._journal.resume(replay)
        if replay.damaged_lines:
            logger.warning(
                "damaged lines in %s: %d; what they held is done again", self._journal.path, replay.damaged_lines
            )
        self._begun, self._durable_mark = True, replay.state.mark
        self._nothing_done = replay.state.mark == 0 and not replay.ahead and not replay.damaged_lines
        return Checkpoint(replay.state, replay.ahead, spent=replay.spent)

    def _already_complete(self, complete: Complete, *, kept: bool) -> Checkpoint:
        if kept and not self.keeps_checkpoint:
            return Checkpoint()
        if self._file is not None:
            self._file.publish_complete(complete)
        if not kept:
            self._put_journal_away(complete)
            logger.info("the job was complete already: its output is published now")
        self._begun = True
        return Checkpoint(complete=complete, kept=kept)

    def _commit(self, commit: Commit) -> None:
        if not self._begun:
            self._begin(commit)
            return
        if self._file is not None:
            self._file.append(commit.records)
        ahead = commit.ahead if self.form != "none" else [_without_result(item) for item in commit.ahead]
        self._journal.commit(ahead, commit.spent, self._state(commit))
        self.committed_bytes = 0 if self._file is None else self._file.state.offset
        self._durable_mark = commit.mark
        self._nothing_done = False

    def _begin(self, commit: Commit) -> None:
        """The first commit of a fresh job: the journal, then the partial output, both durable with their names."""
        self._begun = True
        self._durable_mark = 0
        for folder in self._made_folders:
            self._files.fsync_directory(os.path.dirname(folder))
        if self._damaged:
            if self._file is not None:
                self._file.move_aside()
            move_aside(self._files, self._journal.path)
        self._journal.begin(self._state(commit))
        if self._file is not None:
            self._file.begin()
        self.committed_bytes = 0
        self._nothing_done = True

    def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """1. close the frame · 2. verify · 3. complete line · 4. rename · 5. put the journal away."""
        size = crc = None
        if self._file is not None:
            self._file.close_frame()
            self._file.verify()
            size, crc = self._file.state.offset, self._file.state.crc
        self._nothing_done = False
        complete = Complete(FORMAT, self._job, self._shown_input, bookmark, size, crc, msgspec.to_builtins(summary))
        self._journal.complete(complete)
        if self._file is not None:
            self._file.publish()
        self._put_journal_away(complete)

    def _put_journal_away(self, complete: Complete) -> None:
        if self.keeps_checkpoint:
            self._journal.keep(complete)
        else:
            self._journal.remove()

    def _close(self) -> None:
        if self._nothing_done and self._poison is None:
            self._leave_nothing()
        for file in (self._file, self._opened_journal):
            with contextlib.suppress(OSError):  # all that counts was made durable before
                if file is not None:
                    file.close()
        for lock in reversed(self._locks):
            lock.release()
        self._locks.clear()
        if not self._begun or self._nothing_done:
            for folder in reversed(self._made_folders):
                try:
                    os.rmdir(folder)
                except OSError:  # someone else put something there
                    break
        self._made_folders.clear()

    def _leave_nothing(self) -> None:
        """A job of which nothing is done leaves no trace: put right, it may be another job by name."""
        try:
            if self._file is not None:
                self._file.remove()  # before the journal: a partial output alone would be refused
            self._journal.remove()
        except OSError as error:
            logger.warning("%s can not be removed: %s", self._journal.path, describe(error))

    def _show(self, note: dict[str, Any]) -> None:
        for lock in self._locks:
            lock.show(note)

    def _state(self, commit: Commit) -> State:
        return commit.state(self._job, input=self._shown_input, output=None if self._file is None else self._file.state)

    def _make_folder(self, path: str) -> None:
        missing = []
        while path and not os.path.exists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for folder in reversed(missing):
            os.mkdir(folder)
            self._made_folders.append(folder)

    def check_paths(self) -> tuple[str | None, str]:
        """The paths of output and journal, symlinks resolved. Touches nothing.

        :raises UsageError: if they can not be used.
        """
        for name, path in (("output", self.output), ("checkpoint", self._given_checkpoint)):
            if path is not None and is_descriptor(path):
                raise UsageError(
                    f"the {name} {path} is an open descriptor, and the file behind it would be replaced. For records "
                    "on standard output, use --output - with --checkpoint"
                )
        output, journal = paths_of(self.output, self._given_checkpoint)
        self._refuse_bad_paths(output, journal)
        return output, journal

    def check_writable(self) -> None:
        """See that what is to be written can be, as far as that can be told without touching anything.

        :raises UsageError: if it can not; `open` would say so, too.
        """
        output, journal = self.check_paths()
        denied = os.strerror(errno.EACCES)
        folders = [_folder_of(path) for path in (output or journal, journal)]
        locks = [path for path in self._lock_paths(output, journal) if os.path.exists(path)]
        if not all(os.access(path, os.W_OK | os.X_OK) for path in folders) or not _may_write(locks):
            raise UsageError(f"the folder of {output or journal} can not be written to: {denied}")
        resumed = [*([] if output is None else [f"{output}.partial"]), *([] if self._fresh else [journal])]
        for path in filter(os.path.exists, resumed):
            if not _may_write([path]):
                raise UsageError(f"{path} can not be used: {denied}. Mend that, or name another file")

    def _refuse_bad_paths(self, output: str | None, journal: str) -> None:
        for path in (output, journal):
            if path is None:
                continue
            if os.path.isdir(path):
                raise UsageError(f"{path} is a folder: name a file in it")
            if os.path.islink(path):  # although symlinks are resolved
                raise UsageError(f"{path} is a symlink that leads nowhere but in a circle: choose another name")
            if os.path.exists(path) and not os.path.isfile(path):
                raise UsageError(f"{path} is not a regular file, and would be replaced by one: choose another name")
        written = [journal, f"{journal}.tmp", *self._lock_paths(output, journal)]
        written += [output, f"{output}.partial"] if output else []
        if len(set(written)) < len(written):
            raise UsageError(
                f"the output {output} and the checkpoint {journal} would overwrite each other, or each other's "
                "partial output, lock or temporary file: give the checkpoint another name"
            )
        for path in written:
            if len(os.fsencode(os.path.basename(path))) > NAME_BYTES:
                raise UsageError(f"{path} is too long a name: choose a shorter one")
        for path in written if self._input else []:
            assert self._input is not None
            same = os.path.exists(path) and os.path.exists(self._input) and os.path.samefile(path, self._input)
            if same or os.path.realpath(self._input) == path:
                raise UsageError(f"the input {self._input} would be overwritten: choose another --output or checkpoint")

    def _refuse_lone_partial(self) -> None:
        if self._file is not None and self._files.lstat(self._file.partial) is not None:
            raise CheckpointUnusable(
                f"there is a partial output {self._file.partial}, but no checkpoint {self._journal.path} that "
                "explains it: name the right one with --checkpoint, or start anew with --fresh (fresh=True)"
            )

    def _refuse_other_job(self, found: Job) -> None:
        if found != self._job:
            raise JobMismatch(
                f"the checkpoint {self._journal.path} is of another job: it has {differences(found, self._job)}. "
                "Run that job to its end, choose another --output, or start anew with --fresh (fresh=True)"
            )


def _folder_of(path: str) -> str:
    """The folder in which something is made when `path` is written to, and all that is missing on the way there."""
    folder = os.path.dirname(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def _may_write(paths: Iterable[str]) -> bool:
    return all(os.access(path, os.R_OK | os.W_OK) for path in paths)


def paths_of(output: str | None, checkpoint: str | None) -> tuple[str | None, str]:
    """The paths of output and journal, symlinks resolved: a rename over a link would replace the link."""
    resolved = None if output is None else os.path.realpath(output)
    return resolved, os.path.realpath(checkpoint or f"{resolved}.checkpoint")


def retry_of(output: str) -> str:
    """What the names of the files begin with in which a retry of the failed items of `output` works."""
    return f"{output}.retry"


def command_line(*words: str, job: Job | None) -> str:
    """The command line of a job, as far as its checkpoint tells."""
    words = ("async-recovery", *words, *words_for(job.worker if job else "WORKER"))
    if job is not None and job.version is not None:
        words += ("--job-version", job.version)
    return shlex.join(words)


def differences(found: Job, job: Job) -> str:
    """In what a job that was found differs from the one that is to be run."""
    names = [name for name in Job.__struct_fields__ if getattr(found, name) != getattr(job, name)]
    return ", ".join(f"{name} {getattr(found, name)!r}, not {getattr(job, name)!r}" for name in names)


def _without_result(item: Ahead) -> Ahead:
    """What is remembered of an item where results are not kept: that it is done, or how it failed."""
    failed = item.record is not None and item.record and read_failure(item.record) is not None
    return item if failed else msgspec.structs.replace(item, record=None)


def _path(name: str, given: str | os.PathLike[str]) -> str:
    try:
        path = os.fsdecode(given)
    except TypeError:
        raise UsageError(f"{name} is {shorten(given)}: it must be the path of a file") from None
    if not path or "\0" in path:
        raise UsageError(f"{name} is {path!r}: it must be the path of a file")
    if path.endswith("/"):
        raise UsageError(f"the {name} {path} names a folder: name a file in it")
    return path


def _warn_of_network(path: str) -> None:
    kind = _file_system(os.path.dirname(path))
    if kind in NETWORK_FILE_SYSTEMS:
        logger.warning(
            "%s lies on a network file system (%s): whether locks and fsync hold there is not known", path, kind
        )


def _file_system(folder: str) -> str | None:
    """The type of the file system that `folder` lies on, where Linux tells it."""
    best, kind = "", None
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, found, *_ = line.split()
                point = point.replace("\\040", " ")
                inside = folder == point or folder.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, found
    except (OSError, ValueError):
        return None
    return kind
