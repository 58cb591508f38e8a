"""One run at a time: an advisory lock on a file of its own beside the output.

``flock`` and not ``fcntl``: a lock of the latter kind vanishes when any descriptor of the file is closed. The
file also tells people who holds it, and where that run stands; nothing of that is ever read by a resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
import weakref
from typing import Any

import msgspec

from .errors import AlreadyRunning

NOTE_BYTES = 64 << 10


class Holder(msgspec.Struct, omit_defaults=True):
    """Who holds a lock: written for people and for `status`.

    :ivar started: when the run began, in seconds since the epoch.
    :ivar progress: where it stood when it last said so.
    :ivar run: the run's name, where several share what is locked.
    """

    pid: int
    host: str
    started: float
    progress: dict[str, Any] | None = None
    run: str | None = None


class Lock:
    """The lock at `path`. It is taken without waiting, and its file goes when it is given up.

    :param run: the run's name, where several share what is locked.
    """

    def __init__(self, path: str, run: str | None = None) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._holder = Holder(os.getpid(), socket.gethostname(), time.time(), run=run)

    def acquire(self) -> None:
        """Take the lock.

        :raises AlreadyRunning: if another run holds it; the message says who.
        :raises OSError: if the file can not be made.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _lock(descriptor, self.path)
                if _is_at(descriptor, self.path):  # otherwise it was unlinked by its last holder
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        _held.add(self)
        self.show(None)

    def show(self, progress: dict[str, Any] | None) -> None:
        """Overwrite what the file says of its holder; errors are of no importance here."""
        if self._descriptor is None:
            return
        self._holder.progress = progress
        try:
            note = msgspec.json.encode(self._holder) + b"\n"
            os.pwrite(self._descriptor, note, 0)
            os.ftruncate(self._descriptor, len(note))
        except OSError:
            pass

    def look(self) -> None:
        """Read a byte of the file.

        :raises OSError: if its file system has shut down.
        """
        if self._descriptor is not None:
            os.pread(self._descriptor, 1, 0)

    def release(self) -> None:
        """Remove the file while the lock is held, then give it up."""
        if self._descriptor is None:
            return
        try:
            if _is_at(self._descriptor, self.path):
                os.unlink(self.path)
        except OSError:
            pass
        self.forget()

    def forget(self) -> None:
        """Close the descriptor without giving up the lock for whoever shares it (a parent process)."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # closed all the same, and the job may be complete
                os.close(descriptor)
        _held.discard(self)


class InodeLock:
    """A lock on an existing file itself, so that two names of one file can not be worked on at once."""

    def __init__(self, path: str) -> None:
        """Take it.

        :raises AlreadyRunning: if another run holds it.
        :raises OSError: if the file can not be opened.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(self._descriptor, path)
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)

    def forget(self) -> None:
        """Close the descriptor, which gives up the lock unless a child or parent process shares it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # closed all the same, and the output may still need to be
                os.close(descriptor)
        _held.discard(self)


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyRunning(
            f"{path} is held by {_who_holds(descriptor)}: another run is working on this output. "
            "Wait for its end, or give this run another --output"
        ) from None


def _who_holds(descriptor: int) -> str:
    """The kernel knows it at once; what the file says may still be of a run that was killed, or nothing."""
    there = os.fstat(descriptor)
    place = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    pids = [words[4] for words in _flocks() or () if words[5] == place and int(words[4]) > 0]
    holder = _read(descriptor)
    if pids and (holder is None or str(holder.pid) not in pids):
        return f"process {pids[0]} on {socket.gethostname()}"
    return f"process {holder.pid} on {holder.host}" if holder else "another process"


def read_holder(path: str) -> Holder | None:
    """Who holds the lock at `path` at this moment; None if nobody does. Touches nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        holder = _read(descriptor)
        return holder if holder is not None and _alive(descriptor, holder) else None
    finally:
        os.close(descriptor)


def _alive(descriptor: int, holder: Holder) -> bool:
    inode, flocks = os.fstat(descriptor).st_ino, _flocks()
    if flocks is not None:
        return any(words[5].endswith(f":{inode}") for words in flocks)
    if holder.host != socket.gethostname():  # not Linux: a process of that number is the best that can be known
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flocks() -> list[list[str]] | None:
    """The words of each lock that the kernel has given, the fifth a pid, the sixth a file; None: it does not tell."""
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            return [words for words in map(str.split, locks) if words[1] == "FLOCK"]
    except OSError:
        return None


def _read(descriptor: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, NOTE_BYTES, 0), type=Holder)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_at(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


_held: weakref.WeakSet[Lock | InodeLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child shares the lock and would hold it after its parent has died.
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
