"""The seam: every file operation of the durable path, and the one thread that they run on.

Raw descriptors, no buffers: what a call did is what the operating system was told. A test puts another `Files`
in its place to record the operations, to fail them, or to work on a file system of its own.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import select
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

READ_BYTES = 1 << 20
HAND_OVER_INTERVAL_S = 0.002


_DESCRIPTOR = re.compile(r"/dev/(std(in|out|err)|fd/\d+)|/proc/\d+(/task/\d+)?/fd/\d+")
MOST_LINKS = 40


def is_descriptor(path: str) -> bool:
    """Whether the path names an open descriptor of a process, such as ``/dev/stdout``, and not a file of its own."""
    for _ in range(MOST_LINKS):
        folder, name = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(folder), name)
        if _DESCRIPTOR.fullmatch(path):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return False


class Files:
    """The operations, each one system call. All of them may raise OSError."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open `path` and return its descriptor, which children do not inherit."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset`; none at the end."""
        return os.pread(descriptor, size, offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at `offset`; returns how many bytes were taken, which may be fewer than there are."""
        return os.pwrite(descriptor, data, offset)

    def chmod(self, descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def stat(self, descriptor: int) -> os.stat_result:
        return os.fstat(descriptor)

    def lstat(self, path: str) -> os.stat_result | None:
        """What lies at `path`, or None if nothing does."""
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def drop_cache(self, descriptor: int) -> None:
        """Let what is read next come from the disk: after a failed fsync the cache may show what is not there."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def fsync_directory(self, path: str) -> None:
        """Make the names in the directory `path` durable."""
        try:
            descriptor = self.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.fsync(descriptor)
            finally:
                self.close(descriptor)
        except OSError as error:
            error.filename = path
            raise


DISK = Files()


def naming(attribute: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For methods: an OSError that names no file, as those of calls on a descriptor, names ``self.<attribute>``."""

    def wrap(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(*args, **kwargs)
            except OSError as error:
                if error.filename is None:
                    error.filename = getattr(args[0], attribute)
                raise

        return wrapped

    return wrap


def write_all(files: Files, descriptor: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of `data` at `offset`, in as many calls as it takes."""
    rest = memoryview(data)
    while rest:
        taken = files.pwrite(descriptor, rest, offset)
        rest = rest[taken:]
        offset += taken


def make_durable(files: Files, descriptor: int) -> None:
    """fdatasync, and a look at whether it is to be believed.

    One that is under way when the file system shuts down can return 0 and have done nothing (seen on ext4 and XFS).
    Every read fails from that moment on, so one that succeeds afterwards says that the sync was done.
    """
    files.fdatasync(descriptor)
    files.pread(descriptor, 1, 0)


def read_blocks(files: Files, descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end` in blocks of at most 1 MiB; fewer if the file is shorter."""
    while start < end:
        block = files.pread(descriptor, min(READ_BYTES, end - start), start)
        if not block:
            return
        yield block
        start += len(block)


def _hand_over() -> None:
    """Leave the interpreter to the writer thread for as short as the kernel can wait (about 0.1 ms).

    A busy loop gives the interpreter up at every poll, and has it back before the thread has woken. That also resets
    the thread's claim to it (5 ms), so a busy loop can starve the thread: commits took 80 ms instead of 15.
    """
    select.select((), (), (), 1e-5)


class WriterThread:
    """One thread, one job at a time, and no job that is ever left alone."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="async_recovery-writer")

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job` on the thread and wait for its end, whatever happens to the waiting task.

        A cancellation that arrives meanwhile is absorbed: the caller must know what became of the job, and asks
        for cancellation itself afterwards.
        """
        waiter = asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(job, *args, **kwargs))
        while not waiter.done():
            try:
                await asyncio.wait({waiter}, timeout=HAND_OVER_INTERVAL_S)
            except asyncio.CancelledError:
                continue
            if not waiter.done():
                _hand_over()
        return waiter.result()

    async def read(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job that only reads. A cancellation ends the wait at once: nobody has to know what became of it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(job, *args, **kwargs))

    def stop(self) -> None:
        """No more jobs; the thread ends when the last one has."""
        self._pool.shutdown(wait=False)
