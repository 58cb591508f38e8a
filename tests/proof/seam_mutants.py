"""What layer 10 must notice: each function makes what the kernel is told differ from what the seam is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from async_recovery import output_file
from async_recovery.files import Files
from async_recovery.output_file import OutputFile


class SeamMutant(NamedTuple):
    """A function of this module, and what the kernel's account must show in the first difference."""

    name: str
    shows: str


MUTANTS = [
    SeamMutant("past_the_seam", "told [Operation(name='pwrite'"),
    SeamMutant("behind_its_back", "told [Operation(name='open'"),
    SeamMutant("fdatasync_before_its_write", "told [Operation(name='fsync'"),
    SeamMutant("fsync_without_effect", "seam [Operation(name='fsync'"),
]


def past_the_seam(report: int) -> None:
    """The records are written without it."""

    def write(files: Files, descriptor: int, data: bytes, offset: int) -> None:
        os.pwrite(descriptor, data, offset)

    vars(output_file)["write_all"] = write


def behind_its_back(report: int) -> None:
    """The records are written twice, the second time through a descriptor of which it knows nothing."""
    append = OutputFile.append

    def again(self: Any, records: list[bytes]) -> None:
        append(self, records)
        with open(self.partial, "r+b") as file:  # noqa: PTH123
            start = file.read()
            file.seek(0)
            file.write(start)

    OutputFile.append = again  # type: ignore[method-assign]


def fdatasync_before_its_write(report: int) -> None:
    """Below it, a write waits until what makes it durable has been done."""
    waiting: list[tuple[int, bytes, int]] = []

    def write(self: Files, descriptor: int, data: memoryview, offset: int) -> int:
        waiting.append((descriptor, bytes(data), offset))
        return len(data)

    def before(sync: Callable[[int], None]) -> Callable[[Files, int], None]:
        def synced(self: Files, descriptor: int) -> None:
            sync(descriptor)
            while waiting:
                os.pwrite(*waiting.pop(0))

        return synced

    Files.pwrite = write  # type: ignore[method-assign]
    for name, sync in (("fdatasync", os.fdatasync), ("fsync", os.fsync)):
        setattr(Files, name, before(sync))


def fsync_without_effect(report: int) -> None:
    """Below it, an fsync is not done."""

    def nothing(self: Files, descriptor: int) -> None:
        pass

    Files.fsync = nothing  # type: ignore[method-assign]
