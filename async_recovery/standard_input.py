"""Standard input as the input of a job: kept to its end in a file, the spool, which is the source from then on.

* A start that finds no job reads all of it into ``<output>.input.tmp``, makes that durable and gives it the name
  ``<output>.input``; only then can there be a journal. A spool that is there is therefore whole. (Without an output it
  is ``<checkpoint>.input``.)
* A start that finds a job has its input in the spool. What standard input gives again is compared with it; nothing, or
  a terminal, is fine.
* What was given on standard input can not be had again: however a run ends, a spool that is whole stays until the job
  is complete, and so does a job of which nothing is done yet. It goes just before the journal that says so, since the
  next start would still remove both.
* One that a kill has left unfinished was not the whole input, and nothing on standard input is not the rest of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio.lowlevel
import anyio.to_thread

from .checkpoint import JSON, Checkpoint, Complete, printable
from .compressed import check_plain
from .contracts import Page
from .errors import InputChanged, StorageFailed, UsageError, describe
from .file_ledger import NOT_ALLOWED, FileLedger
from .files import Files, WriterThread, naming, write_all
from .sources import FileSource, file_source

logger = logging.getLogger("async_recovery.sources")

BLOCK_BYTES = 1 << 20


class Spool:
    """The file that standard input is kept in. Its methods run on the writer thread, and may raise OSError.

    :ivar has_job: a journal is there, whose input it is.
    :ivar is_new: this run has made it.
    """

    def __init__(self, path: str, files: Files, thread: WriterThread) -> None:
        self.path = path
        self.temporary = f"{path}.tmp"
        self.thread = thread
        self.has_job = self.is_new = False
        self._files = files
        self._descriptor: int | None = None

    @naming("path")
    def size(self) -> int | None:
        """Its size in bytes; None if it is not there."""
        there = self._files.lstat(self.path)
        return None if there is None else there.st_size

    @naming("path")
    def has(self, block: bytes, offset: int) -> bool:
        """Whether these bytes lie at `offset`."""
        descriptor = self._files.open(self.path, os.O_RDONLY)
        try:
            return self._files.pread(descriptor, len(block), offset) == block
        finally:
            self._files.close(descriptor)

    @naming("temporary")
    def append(self, block: bytes, offset: int) -> None:
        """Write at `offset`; at 0 a new file begins."""
        if self._descriptor is None:
            self._descriptor = self._files.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_all(self._files, self._descriptor, block, offset)

    @naming("path")
    def keep(self) -> None:
        """It is whole: make it durable under its name. The second fsync is for XFS, as for the journal."""
        assert self._descriptor is not None
        self._files.fsync(self._descriptor)
        self._files.rename(self.temporary, self.path)
        self.is_new = True
        self._files.fsync_directory(os.path.dirname(self.path))
        self._files.fsync(self._descriptor)
        self.close()

    @naming("temporary")
    def is_unfinished(self) -> bool:
        """Whether a run was killed while it kept standard input."""
        return self._files.lstat(self.temporary) is not None

    def drop(self) -> None:
        """What was written is not whole, or nobody knows whether it is, and goes."""
        self.close()
        with contextlib.suppress(OSError):
            self._files.unlink(self.path if self.is_new else self.temporary)

    def close(self) -> None:
        """Close what is written."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)

    def remove(self) -> None:
        """Remove it, durably, and what an earlier run may have left of one that was never whole."""
        there = [path for path in (self.temporary, self.path) if self._files.lstat(path) is not None]
        for path in there:
            self._files.unlink(path)
        if there:
            self._files.fsync_directory(os.path.dirname(self.path))


class SpoolingLedger(FileLedger):
    """A file ledger that the spool of the job belongs to: it is under the same lock, and goes with the journal.

    :param options: and all others: as for `FileLedger`, without `input`.
    """

    def __init__(self, output: str | None, checkpoint: str | None, **options: Any) -> None:
        super().__init__(output, checkpoint, **options)
        beside = os.path.realpath(self.output or self._given_checkpoint or "")
        self.spool = Spool(f"{beside}.input", self._files, self._thread)
        self._input, self._shown_input = self.spool.path, printable(self.spool.path)

    def check_paths(self) -> tuple[str | None, str]:
        """See `FileLedger.check_paths`."""
        output, journal = super().check_paths()
        if journal == self.spool.temporary:
            raise UsageError(f"standard input is kept in {journal} at first: give the checkpoint another name")
        for path in (self.spool.path, self.spool.temporary):
            if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
                raise UsageError(
                    f"{path} is not a regular file, and standard input is to be kept there: move it away, or choose "
                    "another --output or checkpoint"
                )
        return output, journal

    def _open(self) -> Checkpoint:
        checkpoint = super()._open()
        self.spool.has_job = checkpoint.state is not None or checkpoint.complete is not None
        return checkpoint

    def _put_journal_away(self, complete: Complete) -> None:
        if not self.keeps_checkpoint:
            self.spool.remove()
        super()._put_journal_away(complete)

    def _leave_nothing(self) -> None:
        """All of it stays: its input may not come again, and without the journal another one would replace it."""

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self.spool.close()
        super()._close()


class StandardInput:
    """The source. Before the first item, standard input is kept in the spool, or compared with what is there.

    :param spool: where; its ledger is open when the source is used.
    :param format: as for `file_source`; None: text.
    :param descriptor: standard input; None: there is none, or nobody but a person to give anything.
    :ivar file: the spool as a source.
    """

    def __init__(self, spool: Spool, format: str | None, descriptor: int | None) -> None:
        self.file = file_source(spool.path, format or "text")
        self._spool = spool
        self._descriptor = descriptor
        self.kind = self.file.kind
        self.path = self.file.path

    def pages(self, position: JSON) -> AsyncIterator[Page]:
        """See `Source.pages`: those of the spool."""
        return self.file.pages(position)

    def share(self, position: JSON) -> float | None:
        """See `Source.share`."""
        return self.file.share(position)

    async def check(self, position: JSON, *, whole: bool) -> None:
        """See `Source.check`."""
        if not whole:
            try:
                await self._take()
            except OSError as error:
                kind = UsageError if error.errno in NOT_ALLOWED else StorageFailed
                raise kind(
                    f"standard input can not be kept in {error.filename}: {error.strerror}. Mend that, and run the "
                    "same line again, with the same on standard input"
                ) from error
        await self.file.check(position, whole=whole)

    def if_there(self) -> FileSource | None:
        """The spool as a source of its own, standard input left alone; None if there is none."""
        return self.file if os.path.exists(self._spool.path) else None

    async def _take(self) -> None:
        spool = self._spool
        size = await spool.thread.run(spool.size)
        if spool.has_job and size is None:
            raise InputChanged(
                f"the input {spool.path}, in which standard input was kept, is missing: restore it to resume, or start "
                "anew with --fresh"
            )
        if self._descriptor is None and size is None:
            raise UsageError(
                "nothing is given on standard input, which is closed or a terminal: pipe the items into this command, "
                "or name a file with --input"
            )
        if spool.has_job:
            await self._compare(size or 0)
        else:
            await self._fill(is_there=size is not None)

    async def _fill(self, *, is_there: bool) -> None:
        """Keep all of it. Nothing at all leaves a spool that is there as it is: its job was killed before it began."""
        spool, block, offset = self._spool, await self._next_block(), 0
        check_plain(None, block)
        if not block and await spool.thread.run(spool.is_unfinished):
            raise UsageError(
                f"nothing is given on standard input, and a run was killed before it had all of it ({spool.temporary} "
                "is a part): give all of it again, which overwrites that file, or remove the file"
            )
        if is_there and not block:
            logger.info("nothing on standard input: the input is %s, which an earlier run has kept", spool.path)
            return
        logger.info("keeping standard input, to its end, in %s", spool.path)
        try:
            await spool.thread.run(spool.append, block, offset)
            while block:
                offset += len(block)
                block = await self._next_block()
                await spool.thread.run(spool.append, block, offset)
            await spool.thread.run(spool.keep)
            await anyio.lowlevel.checkpoint()  # the Ctrl-C that stops this run may have ended the one that gives, too
        except BaseException:
            await spool.thread.run(spool.drop)
            raise

    async def _compare(self, size: int) -> None:
        spool, offset = self._spool, 0
        while block := await self._next_block():
            there = block[: size - offset]
            if not await spool.thread.run(spool.has, there, offset):
                raise self._changed(f"bytes {offset} to {offset + len(there)} differ")
            if len(there) < len(block):
                raise self._changed(f"it goes on after the {size} bytes that are there")
            offset += len(block)
        if 0 < offset < size:
            raise self._changed(f"it ends after {offset} bytes, {size} are there")

    def _changed(self, found: str) -> InputChanged:
        return InputChanged(
            f"standard input is not what was kept in {self.path} when the job began: {found}. Give the same again, or "
            "nothing (< /dev/null), to resume; or start anew with --fresh"
        )

    async def _next_block(self) -> bytes:
        """What comes next; nothing at the end. The thread is left alone when the run is stopped while it waits."""
        if self._descriptor is None:
            return b""
        try:
            return await anyio.to_thread.run_sync(_read, self._descriptor, abandon_on_cancel=True)
        except OSError as error:
            raise UsageError(f"standard input can not be read: {describe(error)}") from error


def standard_input() -> int | None:
    """The descriptor of standard input; None if it is closed or a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    return sys.stdin.fileno()


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, BLOCK_BYTES)
        except BlockingIOError:  # whoever shares it has made it so
            select.select([descriptor], [], [])
