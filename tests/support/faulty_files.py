"""The file operations of a real disk that fails, or of a process that dies, at any one of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from async_recovery.files import Files

OPERATIONS = frozenset(name for name, value in vars(Files).items() if callable(value) and not name.startswith("_"))
READING = frozenset({"open", "close", "pread", "stat", "lstat"})


class FaultyFiles(Files):
    """Records every operation, and fails at one of them.

    `fsync_directory` is counted by its parts. A failing ``close`` has closed all the same, as on Linux.

    :param at: which operation fails, counted from 0; None: none does.
    :param error: its errno.
    :param dies: all later operations fail as well: nothing of what the process goes on to do reaches the disk.
    :param torn: a ``pwrite`` that fails has written half of its bytes.

    :ivar calls: the operations so far.
    """

    def __init__(self, at: int | None = None, error: int = 5, *, dies: bool = False, torn: bool = False) -> None:
        self.calls: list[str] = []
        self._at = at
        self._error = error
        self._dies = dies
        self._torn = torn

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in OPERATIONS and name != "fsync_directory":
            return functools.partial(self._call, name, found)
        return found

    @property
    def failed(self) -> bool:
        return self._at is not None and len(self.calls) > self._at

    @property
    def calls_after_failure(self) -> list[str]:
        return self.calls[self._at + 1 :] if self._at is not None else []

    def _call(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        number = len(self.calls)
        self.calls.append(name)
        if self._at is None or number < self._at or (number > self._at and not self._dies):
            return operation(*args)
        if name == "close":
            operation(*args)
        if name == "pwrite" and self._torn and number == self._at:
            descriptor, data, offset = args
            operation(descriptor, data[: len(data) // 2], offset)
        raise OSError(self._error, os.strerror(self._error))


class ShortWrites(Files):
    """A disk that takes at most three bytes at a time."""

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().pwrite(descriptor, data[:3], offset)
