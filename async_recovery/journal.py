"""The journal's file: read at the start, appended to by each commit, replaced by rename when too much of it is dead."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain

from .checkpoint import (
    AHEAD_LINE_BYTES,
    Ahead,
    Complete,
    Replay,
    Spent,
    State,
    encode_ahead,
    encode_line,
    encode_spent,
    unfinished,
    worth_compacting,
)
from .files import Files, make_durable, naming, read_blocks, write_all

SPENT_BYTES = 16  # of one item in a spent line, about


class Journal:
    """The file at `path`. All methods run on the writer thread and may raise OSError.

    :ivar exists: whether there is one on the disk.
    """

    def __init__(self, path: str, files: Files) -> None:
        self.path = path
        self.exists = False
        self._files = files
        self._descriptor: int | None = None
        self._size = 0
        self._live: dict[int, Ahead] = {}  # what is durable ahead of the mark: a compaction writes it again
        self._live_bytes = 0
        self._spent: dict[int, Spent] = {}  # of items that are not finished
        self._mark = 0

    @naming("path")
    def load(self) -> Replay:
        """Read what is there, from the disk and not from the cache. Changes nothing."""
        replay = Replay()
        try:
            self._descriptor = self._files.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return replay
        self.exists = True
        self._files.fsync(self._descriptor)
        self._files.drop_cache(self._descriptor)
        self._size = self._files.stat(self._descriptor).st_size
        for block in read_blocks(self._files, self._descriptor, 0, self._size):
            replay.feed(block)
        return replay

    @naming("path")
    def resume(self, replay: Replay) -> None:
        """Cut off what does not count, on the disk also beyond the end, and go on from there.

        A power cut can leave the bytes of an append on the disk, but not the length. A later append to that place, cut
        in turn when only its length had come to the disk, brings them back as lines that count (seen on ext4). Making
        a file shorter clears the rest of its last block, so it is made longer first if there is nothing to cut off.
        """
        assert self._descriptor is not None
        if self._size == replay.end:
            self._files.truncate(self._descriptor, replay.end + 1)
        self._files.truncate(self._descriptor, replay.end)
        self._files.fsync(self._descriptor)
        self._size = replay.end
        self._spent = replay.spent
        self._remember(list(replay.ahead.values()), replay.state.mark if replay.state else 0)

    def begin(self, state: State) -> None:
        """A new journal that holds `state` alone, in the place of any other."""
        self._live, self._live_bytes, self._spent, self._mark = {}, 0, {}, 0
        self._replace([_twice(encode_line(state))])

    def commit(self, ahead: list[Ahead], spent: list[Spent], state: State) -> None:
        """Make all of it durable in one append, or in a journal written anew."""
        self._remember(ahead, state.mark)
        self._remember_spent(ahead, spent, state.mark)
        line = encode_line(state)
        lines = [*encode_ahead(ahead), *encode_spent(spent), line]
        size = sum(map(len, lines))
        live = self._live_bytes + SPENT_BYTES * len(self._spent) + 2 * len(line)
        if worth_compacting(self._size + size, live):
            all_spent = encode_spent(item for _, item in sorted(self._spent.items()))
            self._replace(chain(encode_ahead(self._live.values()), all_spent, [_twice(line)]))
        else:
            self._append(lines)

    def complete(self, complete: Complete) -> None:
        """The output is whole: from here on, a start only publishes it."""
        self._append([encode_line(complete)])

    def keep(self, complete: Complete) -> None:
        """Replace the journal by its complete line."""
        self._replace([_twice(encode_line(complete))])

    def remove(self) -> None:
        """The job is done: the journal goes."""
        self._files.unlink(self.path)
        self._files.fsync_directory(os.path.dirname(self.path))
        self.exists = False

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)

    @naming("path")
    def _append(self, lines: list[bytes]) -> None:
        assert self._descriptor is not None
        end = self._write(lines, self._descriptor, self._size)
        make_durable(self._files, self._descriptor)
        self._size = end

    @naming("path")
    def _replace(self, lines: Iterable[bytes]) -> None:
        """Temporary file, write, fsync, rename, fsync of the directory, fsync of the file once more.

        The last one is for XFS, where the directory's fsync can return 0 after the file system has shut down.
        """
        temporary = self.path + ".tmp"
        mode = self._mode()
        descriptor = self._files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666 if mode is None else mode)
        try:
            if mode is not None and mode != stat.S_IMODE(self._files.stat(descriptor).st_mode):
                self._files.chmod(descriptor, mode)  # the umask took a part of it, or an old temporary file was there
            size = self._write(lines, descriptor, 0)
            self._files.fsync(descriptor)
            self._files.rename(temporary, self.path)
            self._files.fsync_directory(os.path.dirname(self.path))
            self._files.fsync(descriptor)
        except BaseException:
            self._files.close(descriptor)
            raise
        replaced, self._descriptor = self._descriptor, descriptor
        self._size, self.exists = size, True
        if replaced is not None:
            self._files.close(replaced)

    def _write(self, lines: Iterable[bytes], descriptor: int, offset: int) -> int:
        for block in _blocks(lines):
            write_all(self._files, descriptor, block, offset)
            offset += len(block)
        return offset

    def _mode(self) -> int | None:
        there = self._files.lstat(self.path)
        return None if there is None else stat.S_IMODE(there.st_mode)

    def _remember(self, ahead: list[Ahead], mark: int) -> None:
        live = self._live
        for item in ahead:
            live[item.index] = item
            self._live_bytes += _size(item)
        passed = range(self._mark, mark) if mark - self._mark < len(live) else [i for i in live if i < mark]
        for index in passed:
            gone = live.pop(index, None)
            if gone is not None:
                self._live_bytes -= _size(gone)
        self._mark = mark

    def _remember_spent(self, ahead: list[Ahead], spent: list[Spent], mark: int) -> None:
        live = self._spent
        if live or spent:
            live.update((item.index, item) for item in spent)
            self._spent = unfinished(live, mark, {item.index for item in ahead})


def _blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines joined to about 1 MiB: fewer calls where they are small, and no join that keeps the loop waiting."""
    block, size = list[bytes](), 0
    for line in lines:
        if block and size + len(line) > AHEAD_LINE_BYTES:
            yield b"".join(block)
            block, size = [], 0
        block.append(line)
        size += len(line)
    yield b"".join(block)


def _twice(line: bytes) -> bytes:
    """The line two times, with an empty one between: no single damaged byte can take both."""
    return line + b"\n" + line


def _size(item: Ahead) -> int:
    return 32 + len(item.record or b"")  # its numbers and brackets take about 32 bytes in the line
