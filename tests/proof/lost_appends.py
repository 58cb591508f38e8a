"""What becomes of an append whose bytes came to the disk, and whose length did not, when the next one meets its fate.

The power goes twice, at moments chosen on purpose: the bytes of the first append are on the disk, but its length is
not; of the second, which goes to the same place, the length is, but its bytes are not.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

from async_recovery.checkpoint import FORMAT, Bookmark, Job, State, encode_line
from async_recovery.files import DISK
from async_recovery.journal import Journal

from .disks import Disk, enter_own_namespace
from .mutants import cut_what_is_seen, instead

_WRITE_AND_WAIT = 7
_libc = ctypes.CDLL(None, use_errno=True)


def state(mark: int, words: str) -> State:
    """A commit; `words`, of one length, tell two of the same mark apart."""
    job = Job("text", f"jobs:{words}", None, "none")
    return State(FORMAT, job, None, mark, mark, 9, Bookmark(None, 0, 0), None, 0)


def write_without_length(descriptor: int, data: bytes, offset: int) -> None:
    """The bytes come to the disk; what the file system knows of the file does not."""
    os.pwrite(descriptor, data, offset)
    assert _libc.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE_AND_WAIT) == 0


def left_after_two_cuts(kind: str) -> int | None:
    """The mark of the journal when the machine is back for the second time; 1 was acknowledged, no other."""
    enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="lost-appends-") as folder:
        point = Path(folder) / "disk"
        point.mkdir()
        with Disk(kind, point) as disk:
            path = point / "journal"
            journal = Journal(str(path), DISK)
            journal.begin(state(1, "first"))
            end = path.stat().st_size
            assert journal._descriptor is not None
            write_without_length(journal._descriptor, encode_line(state(2, "first")), end)
            disk.cut("NOLOGFLUSH")
            journal.close()
            disk.remount()

            journal = Journal(str(path), DISK)
            journal.resume(journal.load())
            assert path.stat().st_size == end
            assert journal._descriptor is not None
            os.pwrite(journal._descriptor, encode_line(state(3, "other")), end)
            disk.cut("LOGFLUSH")
            journal.close()
            disk.remount()

            journal = Journal(str(path), DISK)
            found = journal.load().state
            journal.close()
            return None if found is None else found.mark


def left_without_clearing(kind: str) -> int | None:
    """The same, where a start cuts off only what it sees."""
    with instead(Journal, "resume", cut_what_is_seen)():
        return left_after_two_cuts(kind)
