"""The output's file: `<output>.partial` while the job runs, renamed when it is complete."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from typing import ClassVar
from zlib import crc32

from .checkpoint import Complete, OutputState
from .errors import OutputChanged
from .files import Files, make_durable, naming, read_blocks, write_all
from .lock import InodeLock
from .prefix_crc import PrefixCrc

COMPARED_BYTES = 1 << 20
JOINED_BYTES = 1 << 20  # a join of all that half a buffer holds would keep the event loop waiting for tens of ms
FRESH = "restore it to resume, or start anew with --fresh (fresh=True)"


class Framing:
    """How records become JSON Lines: what stands before the first and the other records, after each, and at the end."""

    form: ClassVar[str] = "jsonl"
    first, between, after, end, empty = b"", b"", b"\n", b"", b""

    def join(self, records: list[bytes], offset: int) -> bytes:
        """The bytes of `records` where the output has `offset` bytes already: they end on a record's boundary."""
        before = self.between if offset else self.first
        return before + (self.after + self.between).join(records) + self.after if records else b""

    def closing(self, offset: int) -> bytes:
        """What a finished output of `offset` bytes still needs."""
        return self.end if offset else self.empty


class ArrayFraming(Framing):
    """A JSON array. Framing stands before each record; the closing bracket belongs to the finish."""

    form = "json"
    first, between, after, end, empty = b"[\n", b",\n", b"", b"\n]\n", b"[]\n"


def framing_of(name: str) -> Framing:
    """The form of an output of that name: an array for ``.json``, else JSON Lines."""
    return ArrayFraming() if name.lower().endswith(".json") else Framing()


class OutputFile:
    """The file of the records. All methods run on the writer thread, but for `crc_of`, and may raise OSError.

    :param path: where the finished output lies; symlinks resolved.
    :param framing: its form, which is that of the name that was given, not of what a symlink leads to.
    :param partial: where it lies until then; None: ``<path>.partial``.
    """

    def __init__(self, path: str, framing: Framing, files: Files, partial: str | None = None) -> None:
        self.path = path
        self.partial = partial or path + ".partial"
        self._framing = framing
        self.resumed = OutputState(0, 0, (0, 0))
        self._files = files
        self._descriptor: int | None = None
        self._lock: InodeLock | None = None
        self._crc = PrefixCrc(COMPARED_BYTES)

    @property
    def state(self) -> OutputState:
        return OutputState(self._crc.offset, self._crc.value, self._crc.tail)

    @naming("partial")
    def begin(self) -> None:
        """An empty partial output, durable with its name: a new file, if that name is a link or one of several."""
        there = self._files.lstat(self.partial)
        if there is not None and self._is_another(there):
            self._files.unlink(self.partial)
        self._open(os.O_CREAT)
        self._files.truncate(self._only_descriptor, 0)
        self._files.fsync(self._only_descriptor)
        self._files.fsync_directory(os.path.dirname(self.partial))

    @naming("partial")
    def resume(self, state: OutputState) -> None:
        """Go on from `state`, after a look at the end of what is there. Nothing is changed if it does not fit.

        :raises OutputChanged: if the partial output is shorter, or its last MiB differs.
        """
        if state.offset == 0:
            self.begin()  # a missing file counts as an empty one, and what is there was never committed
            return
        try:
            self._open(0)
        except FileNotFoundError:
            raise OutputChanged(
                f"the partial output {self.partial} is missing, {state.offset} bytes of it were written: {FRESH}"
            ) from None
        descriptor = self._only_descriptor
        self._files.fsync(descriptor)
        self._files.drop_cache(descriptor)
        size = self._files.stat(descriptor).st_size
        if size < state.offset:
            raise OutputChanged(
                f"the partial output {self.partial} has {size} bytes, {state.offset} were written: {FRESH}"
            )
        crc = PrefixCrc(COMPARED_BYTES, *state.tail, tail=state.tail)
        for block in read_blocks(self._files, descriptor, state.tail[0], state.offset):
            crc.update(block)
        if (crc.offset, crc.value) != (state.offset, state.crc):
            raise self._differs(state.tail[0], state.offset)
        self.resumed, self._crc = state, crc

    @naming("partial")
    def cut(self) -> None:
        """Cut off what was written after the state that was resumed: it is never adopted."""
        if self._files.stat(self._only_descriptor).st_size > self._crc.offset:
            self._files.truncate(self._only_descriptor, self._crc.offset)
            self._files.fsync(self._only_descriptor)

    def append(self, records: list[bytes]) -> None:
        """Write `records`, about 1 MiB of them at a time, and make them durable."""
        at_once = max(1, JOINED_BYTES * len(records) // max(1, sum(map(len, records))))
        groups = (records[start : start + at_once] for start in range(0, len(records), at_once))
        self._write(self._framing.join(group, self._crc.offset) for group in groups)

    @naming("partial")
    def add(self, data: bytes | bytearray) -> None:
        """Write bytes as they are; `sync` makes them durable."""
        write_all(self._files, self._only_descriptor, data, self._crc.offset)
        self._crc.update(data)

    @naming("partial")
    def sync(self, mode: int) -> None:
        """Make what was added durable, with these mode bits; `verify` reads it then, and sees a sync that was none."""
        self._files.chmod(self._only_descriptor, mode)
        self._files.fsync(self._only_descriptor)

    def blocks(self) -> Iterator[bytes]:
        """What was written, in blocks of at most 1 MiB."""
        try:
            yield from read_blocks(self._files, self._only_descriptor, 0, self._crc.offset)
        except OSError as error:
            error.filename = error.filename or self.partial
            raise

    def close_frame(self) -> None:
        """Write what a finished output ends with, and make it durable."""
        self._write([self._framing.closing(self._crc.offset)])

    @naming("partial")
    def verify(self) -> None:
        """See that the file is still ours, whole, and under its name.

        :raises OutputChanged: if it was renamed, removed, cut or written to by someone else.
        """
        found, there = self._files.stat(self._only_descriptor), self._files.lstat(self.partial)
        if there is None or (there.st_ino, there.st_dev) != (found.st_ino, found.st_dev) or found.st_nlink != 1:
            raise OutputChanged(
                f"the partial output {self.partial} is not the file that this run wrote: "
                f"it was moved, replaced or linked while the run went on. Put it back, or {FRESH}"
            )
        if found.st_size != self._crc.offset:
            raise OutputChanged(
                f"the partial output {self.partial} has {found.st_size} bytes, {self._crc.offset} were written: {FRESH}"
            )
        if self.crc_of(0, self._crc.offset, 0) != self._crc.value:
            raise self._differs(0, self._crc.offset)

    @naming("partial")
    def crc_of(self, start: int, end: int, crc: int) -> int | None:
        """The CRC-32 at `end`, going on from `crc` at `start`; None if the file is shorter. Safe on any thread."""
        for block in read_blocks(self._files, self._only_descriptor, start, end):
            crc = crc32(block, crc)
            start += len(block)
        return crc if start == end else None

    def publish(self) -> None:
        """Give the finished output its own name, durably."""
        try:
            self._files.rename(self.partial, self.path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                error.strerror = "it is a mount point of its own (a bind-mounted file?): mount its folder instead"
            raise
        self._files.fsync_directory(os.path.dirname(self.path))

    @naming("path")
    def is_published(self, complete: Complete) -> bool:
        """Whether the output that was completed has its own name already."""
        return self._files.lstat(self.partial) is None and self._is_complete(self.path, complete)

    @naming("path")
    def publish_complete(self, complete: Complete) -> None:
        """Publish an output whose `complete` line is durable; nothing to do if it is published already.

        :raises OutputChanged: if neither the partial nor the published file is the one that was completed.
        """
        partial_is_there = self._files.lstat(self.partial) is not None
        path = self.partial if partial_is_there else self.path
        if not self._is_complete(path, complete):
            raise OutputChanged(
                f"the output {path} is missing or differs from the {complete.size} bytes that were completed: {FRESH}"
            )
        if partial_is_there:
            self.publish()

    def remove(self) -> None:
        """Remove the partial output, durably."""
        self._files.unlink(self.partial)
        self._files.fsync_directory(os.path.dirname(self.partial))

    def move_aside(self) -> None:
        """Move a partial output that no checkpoint explains to the next free name."""
        if self._files.lstat(self.partial) is not None:
            move_aside(self._files, self.partial)

    def close(self) -> None:
        """Close the descriptors, and give up the lock on the file."""
        if self._lock is not None:
            self._lock.forget()
            self._lock = None
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)

    @property
    def _only_descriptor(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def claim(self) -> None:
        """Lock a partial output that is there: its run may still go on, though its lock file was removed.

        :raises AlreadyRunning: if another run holds it.
        """
        there = self._files.lstat(self.partial)
        if there is not None and not self._is_another(there):
            self._lock = InodeLock(self.partial)

    @staticmethod
    def _is_another(there: os.stat_result) -> bool:
        """Whether it is a link, or has other names: a fresh start then makes a file of its own."""
        return there.st_nlink != 1 or not stat.S_ISREG(there.st_mode)

    def _open(self, flags: int) -> None:
        self._descriptor = self._files.open(self.partial, os.O_RDWR | flags)
        if self._lock is not None:
            self._lock.forget()  # it may be that of a file that was moved aside
        self._lock = InodeLock(self.partial)

    @naming("partial")
    def _write(self, parts: Iterable[bytes]) -> None:
        before = self._crc.offset
        for part in parts:
            self.add(part)
        if self._crc.offset > before:
            make_durable(self._files, self._only_descriptor)

    def _is_complete(self, path: str, complete: Complete) -> bool:
        try:
            descriptor = self._files.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            self._files.fsync(descriptor)
            self._files.drop_cache(descriptor)
            size, crc = self._files.stat(descriptor).st_size, 0
            for block in read_blocks(self._files, descriptor, 0, size):
                crc = crc32(block, crc)
            return (size, crc) == (complete.size, complete.crc)
        finally:
            self._files.close(descriptor)

    def _differs(self, start: int, end: int) -> OutputChanged:
        return OutputChanged(
            f"the bytes from {start} to {end} of the partial output {self.partial} are not those that were written: "
            f"{FRESH}"
        )


def move_aside(files: Files, path: str) -> str:
    """Rename `path` to the next free ``<path>.damaged-N``, durably; nothing is ever deleted."""
    number = 1
    while files.lstat(f"{path}.damaged-{number}") is not None:
        number += 1
    files.rename(path, f"{path}.damaged-{number}")
    files.fsync_directory(os.path.dirname(path))
    return f"{path}.damaged-{number}"
