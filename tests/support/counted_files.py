"""The file operations of a real disk, counted, or slow; and whole runs over them."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

from async_recovery import FileLedger, RunSummary
from async_recovery.calls import Items
from async_recovery.engine import Run, to_its_end
from async_recovery.files import Files
from async_recovery.options import Options
from async_recovery.sources import as_source
from async_recovery.workers import Worker

from .faulty_files import FaultyFiles


class CountedFiles(FaultyFiles):
    """Fails never, and knows what was written where.

    :param syncs: whether a sync waits for the disk; no count depends on it.

    :ivar written: bytes, those of the output and those of the journal, its temporary files included.
    """

    def __init__(self, *, syncs: bool = True) -> None:
        super().__init__()
        self._syncs = syncs
        self.written: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        descriptor = super().open(path, flags, mode)
        self._kinds[descriptor] = "output" if path.endswith(".partial") else "journal"
        return descriptor

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        taken = super().pwrite(descriptor, data, offset)
        self.written[self._kinds[descriptor]] += taken
        return taken

    def fdatasync(self, descriptor: int) -> None:
        if self._syncs:
            super().fdatasync(descriptor)

    def fsync(self, descriptor: int) -> None:
        if self._syncs:
            super().fsync(descriptor)


class SlowFiles(Files):
    """A disk that takes so many seconds more for each fsync and fdatasync, and counts them."""

    def __init__(self, more_s: float) -> None:
        self.syncs = 0
        self._more_s = more_s

    def fdatasync(self, descriptor: int) -> None:
        self._wait()
        super().fdatasync(descriptor)

    def fsync(self, descriptor: int) -> None:
        self._wait()
        super().fsync(descriptor)

    def _wait(self) -> None:
        self.syncs += 1
        time.sleep(self._more_s)


async def run_over(
    files: Files, worker: Worker, items: Items, output: str | os.PathLike[str], **options: Any
) -> RunSummary:
    """`run_resumable` on these file operations."""
    settings = Options(**options)
    settings.check()
    source = as_source(items, None)
    ledger = FileLedger(output, input=source.path, files=files)
    return await to_its_end(Run(worker, source, ledger, settings))
