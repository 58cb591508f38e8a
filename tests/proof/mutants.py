"""Ways to break the durable path on purpose: what the negative controls of the layers are made of.

A mutant lives only in the process in which it is put in, and only as long as its `with` lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from async_recovery.files import Files

from .crash_model import MemoryFiles

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


def while_in(
    owner: type, method: str, operation: str, instead_of: Callable[..., Any], files: type[Files] = MemoryFiles
) -> Patch:
    """While `owner.method` runs, `instead_of` (given the real one and its arguments) is the operation of `files`."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        whole, real = getattr(owner, method), getattr(files, operation)

        def broken(self: Any, *args: Any) -> Any:
            calls = iter(range(1000))

            def call(seam: Files, *given: Any) -> None:
                instead_of(real, next(calls), seam, *given)

            with mock.patch.object(files, operation, call):
                return whole(self, *args)

        with mock.patch.object(owner, method, broken):
            yield

    return patched


def silent(
    owner: type, method: str, operation: str, which: int | None = None, files: type[Files] = MemoryFiles
) -> Patch:
    """While `owner.method` runs, the operation `operation` of `files` (only its call number `which`) does nothing."""

    def call(real: Callable[..., Any], number: int, *given: Any) -> None:
        if which is not None and number != which:
            real(*given)

    return while_in(owner, method, operation, call, files)


def tried_again(owner: type, method: str, operation: str) -> Patch:
    """While `owner.method` runs, the file operation `operation` is called once more if it fails."""

    def call(real: Callable[..., Any], _: int, *given: Any) -> None:
        try:
            real(*given)
        except OSError:
            real(*given)

    return while_in(owner, method, operation, call)


def instead(owner: Any, method: str, broken: Callable[..., Any]) -> Patch:
    """`broken` in the place of `owner.method`."""
    return lambda: mock.patch.object(owner, method, broken)


def nothing(*_: Any) -> None:
    """A step that is left out."""


def together(*patches: Patch) -> Patch:
    """All of them at once."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return patched


def offset_of_stat(self: Any) -> None:
    """In the place of `OutputFile.cut`: what was written after the last commit is adopted."""
    size = self._files.stat(self._only_descriptor).st_size
    if size > self._crc.offset:
        for block in [self._files.pread(self._only_descriptor, size, self._crc.offset)]:
            self._crc.update(block)


def cut_what_is_seen(self: Any, replay: Any) -> None:
    """In the place of `Journal.resume`: what lies on the disk beyond the end stays there."""
    if self._size != replay.end:
        self._files.truncate(self._descriptor, replay.end)
        self._files.fsync(self._descriptor)
        self._size = replay.end
    self._spent = replay.spent
    self._remember(list(replay.ahead.values()), replay.state.mark)
