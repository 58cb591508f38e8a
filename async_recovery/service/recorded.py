"""The recorded failures of a job, read out of its output as far as it is committed, also while the job runs.

The groups are counted once over each byte: what was counted is remembered with the place up to which it was.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from ..failures import failures_in, whole_lines
from ..files import DISK, read_blocks
from ..records import FailedWith, Failure
from .attempts import kind_of
from .output import Opened

MOST_GROUPS = 100
SAMPLES = 3
LONGEST_TEXT = 500
BYTES_AT_ONCE = 256 << 20
PAGE_BYTES = 2 << 20


class Recorded(msgspec.Struct, frozen=True):
    """A recorded failure."""

    index: int
    error: FailedWith
    item: Any


class SampleFailure(msgspec.Struct, frozen=True):
    """One of a group, its texts cut."""

    index: int
    message: str
    item: str


class FailureGroup(msgspec.Struct):
    """Failures of the same type whose messages differ in numbers alone."""

    type: str
    message: str
    count: int
    samples: list[SampleFailure]


class FailuresView(msgspec.Struct, frozen=True):
    """Failures of a job.

    :ivar groups: of all that were counted, the largest first.
    :ivar failures: some of them, in order.
    :ivar next: where to go on (`after`); None at the end.
    :ivar counted_bytes: of `committed_bytes` of the output: fewer, if there is too much to count at once: ask again.
    """

    groups: list[FailureGroup]
    failures: list[Recorded]
    next: int | None
    counted_bytes: int
    committed_bytes: int


class Groups:
    """The groups of the failures in one output, up to some place.

    :ivar busy: to be held by whoever counts.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], FailureGroup] = {}
        self._file = (0, 0, 0)
        self.counted = 0
        self.busy = asyncio.Lock()

    def count(self, opened: Opened) -> list[FailureGroup]:
        """Go on up to the end of what counts, or as far as is reasonable at once; the groups, the largest first."""
        assert opened.descriptor is not None
        there = os.fstat(opened.descriptor)
        # A number of a file is given again when that one is gone: of a whole output the time tells, too.
        file = (there.st_dev, there.st_ino, there.st_mtime_ns if opened.is_whole else 0)
        if file != self._file or opened.size < self.counted:
            self._file, self.counted, self._groups = file, 0, {}
        for end, failure in failures_from(opened.descriptor, self.counted, opened.size):
            self.counted = end
            if failure is not None:
                self._add(failure)
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def _add(self, failure: Failure) -> None:
        kind, message = failure.error.type, failure.error.message
        key = (kind, kind_of(message[: 4 * LONGEST_TEXT])[:LONGEST_TEXT])
        if key not in self._groups and len(self._groups) >= MOST_GROUPS:
            key = ("", "")
        group = self._groups.setdefault(
            key, FailureGroup(kind, message[:LONGEST_TEXT], 0, []) if key[0] else FailureGroup("others", "", 0, [])
        )
        group.count += 1
        if len(group.samples) < SAMPLES:
            item = msgspec.json.encode(failure.item).decode()
            group.samples.append(SampleFailure(failure.index, message[:LONGEST_TEXT], item[:LONGEST_TEXT]))


def failures_page(opened: Opened, groups: Groups, after: int, limit: int) -> FailuresView:
    """Failures after the byte `after`, at most `limit`, or fewer if they are long, and the groups of all.

    :param opened: the output; stays open.
    """
    descriptor, end = opened.descriptor, opened.size
    if descriptor is None:
        return FailuresView([], [], None, 0, 0)
    counted = groups.count(opened)
    passed = _line_after(descriptor, min(after, end), end)
    found: list[Recorded] = []
    room = PAGE_BYTES
    for stop, failure in failures_from(descriptor, passed, end):
        if failure is not None:
            if len(found) >= limit or room <= 0:
                break
            found.append(Recorded(failure.index, failure.error, failure.item))
            room -= len(msgspec.json.encode(failure.item)) + len(failure.error.message)
        passed = stop
    return FailuresView(counted, found, passed if passed < end else None, groups.counted, end)


def _line_after(descriptor: int, at: int, end: int) -> int:
    """Where the first line begins that does so at `at` or later."""
    while 0 < at < end:
        block = os.pread(descriptor, 1 << 16, at - 1)
        if not block:  # it is shorter now
            return end
        if (newline := block.find(b"\n")) >= 0:
            return at + newline
        at += len(block)
    return at


def failures_from(descriptor: int, start: int, end: int) -> Iterator[tuple[int, Failure | None]]:
    """Each failure from a byte on with the byte after its line; and the byte after some lines, with None.

    Up to `end`, or as far as is reasonable at once: at least one line.
    """
    offset = start
    for lines in whole_lines(read_blocks(DISK, descriptor, start, end)):
        for _, stop, failure in failures_in(lines):
            yield offset + stop + 1, failure
        offset += len(lines)
        yield offset, None
        if offset - start >= BYTES_AT_ONCE:
            return
