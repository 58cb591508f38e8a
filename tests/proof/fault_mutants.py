"""Broken durable paths for the controls of layer 6: each function breaks the process that it is called in."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from async_recovery import journal, output_file
from async_recovery.errors import StorageFailed
from async_recovery.file_ledger import FileLedger
from async_recovery.files import Files
from async_recovery.journal import Journal

from .mutants import nothing
from .test_layer_2_mutants import journal_first, not_cut_back, removed_before_publishing


class FaultMutant(NamedTuple):
    """A function of this module, the job and the fault that show it, and the invariant that then is broken."""

    name: str
    job: str
    kind: str
    broken: str


MUTANTS = [
    FaultMutant("journal_before_records", "lines", "before", "I4"),
    FaultMutant("journal_not_cut_back", "lines+middle.9", "before", "I3"),
    FaultMutant("nothing_cut_back", "fresh", "before", "I3"),
    FaultMutant("journal_removed_before_publishing", "lines", "after", "I3"),
    FaultMutant("ahead_forgotten", "lines+middle.5", "before", "I5"),
    FaultMutant("full_disk_swallowed", "lines", "ENOSPC", "I9"),
    FaultMutant("short_write_not_continued", "lines", "short", "I4"),
    FaultMutant("second_fsync", "lines", "EIO", "I9"),
    FaultMutant("no_poison", "lines", "EIO", "(I3|I9)"),  # it writes on, or clears away a job that has begun
]


def journal_before_records(report: int) -> None:
    FileLedger._commit = journal_first  # type: ignore[method-assign]


def journal_not_cut_back(report: int) -> None:
    Journal.resume = not_cut_back  # type: ignore[method-assign]


def nothing_cut_back(report: int) -> None:
    Files.truncate = nothing  # type: ignore[method-assign, assignment]


def journal_removed_before_publishing(report: int) -> None:
    Journal.complete = removed_before_publishing  # type: ignore[method-assign]


def ahead_forgotten(report: int) -> None:
    decide = FileLedger._decide

    def forgets(self: FileLedger, replay: Any) -> Any:
        replay._ahead = {}
        return decide(self, replay)

    FileLedger._decide = forgets  # type: ignore[method-assign]


def full_disk_swallowed(report: int) -> None:
    pwrite = Files.pwrite

    def swallows(self: Files, descriptor: int, data: memoryview, offset: int) -> int:
        try:
            return pwrite(self, descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return len(data)

    Files.pwrite = swallows  # type: ignore[method-assign]


def short_write_not_continued(report: int) -> None:
    def once(files: Files, descriptor: int, data: bytes, offset: int) -> None:
        files.pwrite(descriptor, memoryview(data), offset)

    for module in (output_file, journal):
        vars(module)["write_all"] = once


def second_fsync(report: int) -> None:
    fdatasync = Files.fdatasync

    def twice(self: Files, descriptor: int) -> None:
        try:
            fdatasync(self, descriptor)
        except OSError:
            fdatasync(self, descriptor)

    Files.fdatasync = twice  # type: ignore[method-assign]


def no_poison(report: int) -> None:
    failed = FileLedger._failed

    def forgets(self: FileLedger, error: OSError) -> StorageFailed:
        found = failed(self, error)
        self._poison = None
        return found

    FileLedger._failed = forgets  # type: ignore[method-assign]
